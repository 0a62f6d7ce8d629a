"""The port at which Ray Serve's gRPC proxy asks for certificates. Written against Ray 2.60.

Serve opens a plain port alone, but hands its server to each of its `grpc_servicer_functions` before that starts. The
proxy has no arguments of ours: what it needs is in the environment that Ray was started with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import grpc
import pydantic

from expertmesh.config import ClusterConfig, Port, Section
from expertmesh.errors import ClusterError, ConfigError
from expertmesh.v1 import directory_pb2_grpc
from expertmesh.wire.channel import server_credentials
from expertmesh.wire.tls import CurrentTls, TlsFiles
from expertmesh.yaml_file import first_problem

VARIABLE = "EXPERTMESH_GRPC_TLS"
ADDRESSES = "[::]"
"""All, as for the plain port: replicas and routers come by loopback, the others from elsewhere."""
CERTIFICATE = "x509_pem_cert"
"""In a call's auth context: the certificate that the caller has shown, which TLS has verified."""

_open: list[grpc.ServerCredentials] = []
"""Kept for as long as the process lives: gRPC does not."""


class SecurePort(Section):
    port: Port
    tls: TlsFiles


def environment(config: ClusterConfig) -> dict[str, str]:
    """What Ray's processes need in their environment to serve `config`."""
    if config.security.tls is None:
        return {}
    return {VARIABLE: SecurePort(port=config.server.grpc_tls_port, tls=config.security.tls).model_dump_json()}


def secure_port(variables: Mapping[str, str]) -> SecurePort | None:
    """What `environment` put there; raises ConfigError where it is something else."""
    try:
        return SecurePort.model_validate_json(variables[VARIABLE]) if VARIABLE in variables else None
    except pydantic.ValidationError as error:
        raise ConfigError(f"{VARIABLE}: {first_problem(error)}") from None


def add_directory(servicer: Any, server: grpc.aio.Server) -> None:
    """One of Serve's `grpc_servicer_functions`. Raises ConfigError where the files cannot serve, ClusterError where the
    port is in use: the proxy does not start then."""
    directory_pb2_grpc.add_DirectoryServiceServicer_to_server(servicer, server)
    wanted = secure_port(os.environ)
    if wanted is None:
        return
    credentials = server_credentials(CurrentTls(wanted.tls))
    try:
        server.add_secure_port(f"{ADDRESSES}:{wanted.port}", credentials)
    except RuntimeError:
        raise ClusterError(f"server.grpc_tls_port: port {wanted.port} is in use") from None
    _open.append(credentials)


def shows_certificate(auth_context: Mapping[str, Any]) -> bool:
    """Whether a call came by the port that asks for one. gRPC makes the auth context of the connection: no caller can
    put anything there."""
    return bool(auth_context.get(CERTIFICATE))
