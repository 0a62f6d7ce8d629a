"""How both ends open their gRPC connections."""

from __future__ import annotations

import time
from collections.abc import Sequence

import grpc
import grpc.aio

from expertmesh.wire.tls import CurrentTls, TlsBytes

FINGERPRINT_KEY = "expertmesh-fingerprint"
"""Metadata key under which the caller of Dispatch names its model."""

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 256 * 2**20

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
SERVER_OPTIONS: list[tuple[str, int]] = [
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
]
SERVER_NAME_OPTION = "grpc.ssl_target_name_override"
SETTLE_S = 0.05
"""How long handshakes that have begun get to take what they need of the certificates before those are replaced."""


def open_channel(
    address: str, tls: CurrentTls | None = None, options: Sequence[tuple[str, int]] = CHANNEL_OPTIONS
) -> grpc.aio.Channel:
    """A channel, not connected yet, which shows and trusts what `tls` holds now."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    credentials, more = client_side(tls)
    return grpc.aio.secure_channel(address, credentials, options=[*options, *more])


def client_side(tls: CurrentTls) -> tuple[grpc.ChannelCredentials, list[tuple[str, str]]]:
    """What a channel shows and trusts now, and the options that name the server."""
    pem, server_name = tls.read(), tls.files.server_name
    name = [(SERVER_NAME_OPTION, server_name)] if server_name else []
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate), name


def server_credentials(tls: CurrentTls) -> grpc.ServerCredentials:
    """Of a server that asks for its callers' certificates too, and looks at `tls` before each handshake.

    For one port, and the caller must keep them for as long as it is open: gRPC does not.
    """
    shown = tls.read()

    def replacement() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        pem = tls.read()
        if pem == shown:
            return None
        shown = pem
        # gRPC frees the old ones though another thread's handshake may be starting with them (grpc/grpc#36693);
        # until this returns, no more begin
        time.sleep(SETTLE_S)
        return _configuration(pem)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown),
        replacement,  # type: ignore[arg-type]  # its stub knows no None
        require_client_authentication=True,
    )


def _configuration(pem: TlsBytes) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], pem.ca)
