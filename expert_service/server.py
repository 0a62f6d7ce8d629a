"""The gRPC server of a replica: a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from expertmesh.errors import ClusterError
from expertmesh.v1 import expert_pb2, expert_pb2_grpc
from expertmesh.wire.channel import SERVER_OPTIONS, server_credentials
from expertmesh.wire.tls import CurrentTls, TlsFiles

T = TypeVar("T")
SERVICE = expert_pb2.DESCRIPTOR.services_by_name["ExpertService"].full_name
HEALTH_NAMES = ("", SERVICE)


class LoopThread:
    """An event loop on a thread of its own."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it there and waits for its result; not to be called from the loop itself."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class ExpertServer:
    """grpc.aio server with ExpertService, health and reflection; its methods run on one event loop."""

    def __init__(self, servicer: expert_pb2_grpc.ExpertServiceServicer, tls: TlsFiles | None = None) -> None:
        """Raises ConfigError where a file of `tls` cannot serve."""
        self._servicer = servicer
        self._tls = CurrentTls(tls) if tls else None
        self._credentials: grpc.ServerCredentials | None = None
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()

    async def start(self, host: str, ports: tuple[int, int] | None) -> str:
        """Listens on the first free port of the range, or on any; returns host:port. Raises ClusterError if none is
        free."""
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        port = bind(self._add_port, host, ports)
        await self.set_serving(True)
        await self._server.start()
        return f"{host}:{port}"

    def _add_port(self, address: str) -> int:
        assert self._server is not None
        if self._tls is None:
            return self._server.add_insecure_port(address)
        self._credentials = server_credentials(self._tls)
        return self._server.add_secure_port(address, self._credentials)

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in HEALTH_NAMES:
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Accepts no more calls and cancels those that are not over after `grace_s`."""
        if self._server is not None:
            await self._server.stop(grace_s)


def bind(add_port: Callable[[str], int], host: str, ports: tuple[int, int] | None) -> int:
    """The port taken: the first free one of `ports` (both ends count) or any; raises ClusterError if none is free."""
    candidates = range(ports[0], ports[1] + 1) if ports else range(1)
    for port in candidates:
        try:
            bound = add_port(f"{host}:{port}")
        except RuntimeError:
            continue
        if bound:
            return bound
    if ports:
        raise ClusterError(f"replica: every port from {ports[0]} to {ports[1]} is in use on {host}")
    raise ClusterError(f"replica: cannot listen on {host}")
