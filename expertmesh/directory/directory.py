"""The directory's calls, whatever carries them: a gRPC server of its own or Ray Serve's proxy."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator

from expertmesh.directory.registry import Registry
from expertmesh.v1 import directory_pb2 as pb

LOADS_INTERVAL_S = 1.0
HEARTBEAT_S = 2.0
"""A watcher that has heard nothing for some of these may take the directory for gone."""


class Directory:
    """All methods run on one event loop."""

    def __init__(self) -> None:
        self.watchers = 0
        """Watches that are open."""
        self._registry = Registry(uuid.uuid4().hex[:12], time.monotonic())
        self._changed: asyncio.Event | None = None

    def announce(self, request: pb.AnnounceRequest) -> pb.AnnounceResponse:
        """Raises WireError where the entry is of no use."""
        version = self._registry.version
        self._registry.announce(request.replica, request.lease_ms, time.monotonic())
        self._wake(version)
        return pb.AnnounceResponse(directory_id=self._registry.directory_id)

    def withdraw(self, request: pb.WithdrawRequest) -> pb.WithdrawResponse:
        version = self._registry.version
        self._registry.withdraw(request.replica_id)
        self._wake(version)
        return pb.WithdrawResponse()

    def list(self) -> pb.Table:
        return self._registry.table(time.monotonic())

    async def watch(self) -> AsyncGenerator[pb.Table, None]:
        """The table now, at once after each change of membership or state, and otherwise when loads have changed or
        a heartbeat is due."""
        self.watchers += 1
        try:
            while True:
                table = self.list()
                loads = self._registry.loads_revision
                sent_at = time.monotonic()
                yield table
                while not due(self._registry, table, loads, sent_at, time.monotonic()):
                    await self._wait(sent_at)
        finally:
            self.watchers -= 1

    async def _wait(self, sent_at: float) -> None:
        """Until something may be due."""
        if self._changed is None:
            self._changed = asyncio.Event()
        now = time.monotonic()
        until = min(self._registry.next_change_at(now), now + LOADS_INTERVAL_S, sent_at + HEARTBEAT_S)
        try:
            async with asyncio.timeout(max(0.001, until - now)):
                await self._changed.wait()
        except TimeoutError:
            return

    def _wake(self, version: int) -> None:
        if self._registry.version != version and self._changed is not None:
            self._changed.set()
            self._changed = None


def due(registry: Registry, sent: pb.Table, sent_loads: int, sent_at: float, now: float) -> bool:
    """Whether a watcher to whom `sent` went at `sent_at`, with the loads of revision `sent_loads`, gets a new table."""
    registry.expire(now)
    if registry.version != sent.version or registry.settling(now) != sent.settling:
        return True
    silent_s = now - sent_at
    return silent_s >= HEARTBEAT_S or (silent_s >= LOADS_INTERVAL_S and registry.loads_revision != sent_loads)
