#include "server_tls.h"

#include <grpc/grpc.h>

namespace expertmesh::server {
namespace {

grpc_ssl_certificate_config_reload_status fetch(void* read, grpc_ssl_server_certificate_config** config) {
  const std::optional<Tls> tls = (*static_cast<const ReadTls*>(read))();
  if (!tls) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
  const grpc_ssl_pem_key_cert_pair shown{tls->key.c_str(), tls->certificate.c_str()};
  *config = grpc_ssl_server_certificate_config_create(tls->ca.c_str(), &shown, 1);
  return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
}

}  // namespace

TlsCredentials::TlsCredentials(const ReadTls* read)
    : credentials_(grpc_ssl_server_credentials_create_with_options(
          grpc_ssl_server_credentials_create_options_using_config_fetcher(
              GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY, &fetch, const_cast<ReadTls*>(read)))) {}

TlsCredentials::~TlsCredentials() { grpc_server_credentials_release(credentials_); }

int TlsCredentials::AddPortToServer(const std::string& address, grpc_server* server) {
  return grpc_server_add_http2_port(server, address.c_str(), credentials_);
}

}  // namespace expertmesh::server
