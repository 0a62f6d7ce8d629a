#include "server_tls.h"

#include <grpc/grpc.h>

#include <utility>

namespace expertmesh::server {

TlsCredentials::TlsCredentials(ReadTls read)
    : read_(std::move(read)),
      credentials_(grpc_ssl_server_credentials_create_with_options(
          grpc_ssl_server_credentials_create_options_using_config_fetcher(
              GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY, &fetch, this))) {}

TlsCredentials::~TlsCredentials() { grpc_server_credentials_release(credentials_); }

int TlsCredentials::AddPortToServer(const std::string& address, grpc_server* server) {
  return grpc_server_add_http2_port(server, address.c_str(), credentials_);
}

std::optional<Tls> TlsCredentials::replacement() {
  std::optional<Tls> tls = read_();
  if (!tls || tls == shown_) return std::nullopt;
  return shown_ = std::move(tls);
}

// gRPC frees the old certificates though another thread's handshake may be starting with them (grpc/grpc#36693); a
// replica's handshakes start on the one thread that polls
grpc_ssl_certificate_config_reload_status TlsCredentials::fetch(void* self,
                                                                grpc_ssl_server_certificate_config** config) {
  const std::optional<Tls> tls = static_cast<TlsCredentials*>(self)->replacement();
  if (!tls) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
  const grpc_ssl_pem_key_cert_pair shown{tls->key.c_str(), tls->certificate.c_str()};
  *config = grpc_ssl_server_certificate_config_create(tls->ca.c_str(), &shown, 1);
  return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
}

}  // namespace expertmesh::server
