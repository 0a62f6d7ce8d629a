"""The process's connection to the expert tier: one per directory and model, made on first use."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Literal, Protocol

from expertmesh.config import Section
from expertmesh.errors import ConfigError
from expertmesh.wire.tls import TlsFiles
from router_service.dispatcher import Dispatcher
from router_service.replicas import LiveReplicas
from router_service.transport.base import Transport

log = logging.getLogger(__name__)

SETTINGS_KEY = "expertmesh"
"""Key in vLLM's `additional_config` that holds the RouterSettings."""
NATIVE_MODULE = "expertmesh_native"


class RouterSettings(Section):
    """How a router process finds its experts, and what else its engine's process is told."""

    directory: str = "127.0.0.1:9000"
    directory_tls: TlsFiles | None = None
    """Where the directory asks for a certificate."""
    wait_for_experts_s: float = 60.0
    degrade_after_s: float | None = None
    dispatch_timeout_s: float = 30.0
    tls: TlsFiles | None = None
    """Of the replicas."""
    transport: Literal["auto", "native", "python"] = "auto"
    """The native one needs the distribution expertmesh-native; auto takes it where that is installed."""
    attention_threads: int | None = None
    """On CPUs; None: as many as the rest of the model has."""
    checksums: bool = False
    """Dispatches get one, and an answer without the right one is a failure."""


class ClosableTransport(Transport, Protocol):
    def close(self) -> None:
        """Ends the streams and the threads."""


@functools.cache
def connect(settings: RouterSettings, fingerprint: str) -> Dispatcher:
    """The dispatcher of this process; the same for all layers, so that they share one stream per replica."""
    replicas = LiveReplicas()
    transport = open_transport(settings, fingerprint, replicas)
    return Dispatcher(replicas, transport, settings.wait_for_experts_s, settings.degrade_after_s)


def open_transport(settings: RouterSettings, fingerprint: str, replicas: LiveReplicas) -> ClosableTransport:
    """The transport that the settings ask for, following the directory into `replicas`; raises ConfigError where it
    cannot be had."""
    installed = importlib.util.find_spec(NATIVE_MODULE) is not None
    if settings.transport == "native" and not installed:
        raise ConfigError(f"transport: native, but {NATIVE_MODULE} is not installed here (`make setup` builds it)")
    native = installed and settings.transport != "python"
    log.info("%s transport%s", "native" if native else "Python", "" if installed else f": no {NATIVE_MODULE} here")
    arguments = (
        settings.directory,
        fingerprint,
        replicas,
        settings.dispatch_timeout_s,
        settings.tls,
        settings.directory_tls,
        settings.checksums,
    )
    if native:
        from router_service.transport.native_transport import NativeTransport

        return NativeTransport(*arguments)
    from router_service.transport.grpc_transport import GrpcTransport

    return GrpcTransport(*arguments)
