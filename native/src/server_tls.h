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
};

/// What the next handshake uses; nothing: what the last one did.
using ReadTls = std::function<std::optional<Tls>()>;

/// Mutual TLS that asks before each handshake, which grpc++ offers in its C core alone.
class TlsCredentials final : public grpc::ServerCredentials {
 public:
  /// `read` must outlive the server.
  explicit TlsCredentials(const ReadTls* read);
  ~TlsCredentials() override;

  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override;

  grpc_server_credentials* const credentials_;
};

}  // namespace expertmesh::server
