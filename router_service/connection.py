"""The process's connection to the expert tier: one per directory and model, made on first use."""

from __future__ import annotations

import functools

from expertmesh.config import Section
from router_service.dispatcher import Dispatcher
from router_service.replicas import LiveReplicas
from router_service.transport.grpc_transport import GrpcTransport

SETTINGS_KEY = "expertmesh"
"""Key in vLLM's `additional_config` that holds the RouterSettings."""


class RouterSettings(Section):
    """How a router process finds its experts."""

    directory: str = "127.0.0.1:9000"
    wait_for_experts_s: float = 60.0
    dispatch_timeout_s: float = 30.0


@functools.cache
def connect(settings: RouterSettings, fingerprint: str) -> Dispatcher:
    """The dispatcher of this process; the same for all layers, so that they share one stream per replica."""
    replicas = LiveReplicas()
    transport = GrpcTransport(settings.directory, fingerprint, replicas, settings.dispatch_timeout_s)
    return Dispatcher(replicas, transport, settings.wait_for_experts_s)
