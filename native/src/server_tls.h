// A replica's certificates, which may change while it serves.
#pragma once

#include <grpc/grpc_security.h>
#include <grpcpp/security/server_credentials.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>

namespace expertmesh::server {

/// PEM text; callers must show a certificate that `ca` signed.
struct Tls {
  std::string ca, certificate, key;

  bool operator==(const Tls& other) const {
    return ca == other.ca && certificate == other.certificate && key == other.key;
  }
};

/// What the next handshake uses; nothing: what the last one did.
using ReadTls = std::function<std::optional<Tls>()>;

/// Mutual TLS that asks before each handshake, which grpc++ offers in its C core alone. For one port, and must outlive
/// the server.
class TlsCredentials final : public grpc::ServerCredentials {
 public:
  explicit TlsCredentials(ReadTls read);
  ~TlsCredentials() override;

  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override;

  /// What the next handshake uses where that is not what the last one did.
  std::optional<Tls> replacement();
  static grpc_ssl_certificate_config_reload_status fetch(void* self, grpc_ssl_server_certificate_config** config);

  const ReadTls read_;
  std::optional<Tls> shown_;
  grpc_server_credentials* const credentials_;
};

}  // namespace expertmesh::server
