"""Follows the directory and holds a stream open to every replica in it, whichever transport uses the streams."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import grpc
import grpc.aio

from expertmesh.directory.client import want, watch
from expertmesh.directory.table import merge
from expertmesh.errors import ClusterError, ConfigError, FingerprintMismatch, WireError
from expertmesh.v1 import directory_pb2
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.v1 import expert_pb2_grpc as pb_grpc
from expertmesh.wire.channel import PROTOCOL_VERSION, open_channel
from expertmesh.wire.tls import CurrentTls, TlsFiles
from router_service.replicas import LiveReplica, LiveReplicas, experts_by_layer
from router_service.transport.pulse import LOOK_S, Answered, Pulse
from router_service.transport.shared_loop import SharedLoop

log = logging.getLogger(__name__)

DESCRIBE_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S, PROBE_PERIOD_S = 1.0, 0.25
WANT_PERIOD_S = 1.0
FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 2.0
"""Between attempts to reach a replica that the directory lists."""


class Stream(Protocol):
    """A Dispatch stream that a transport has opened. Its methods run on the event loop of the Links."""

    def ask(self) -> Answered:
        """Asks for NO_LAYER."""

    async def ended(self) -> str:
        """Returns why, once the stream has ended."""

    async def close(self) -> None:
        """Ends the stream where it has not ended yet; all who wait for answers on it are told so. Called once, after
        `ended` has returned or been cancelled."""


OpenStream = Callable[[str, LiveReplica], Awaitable[Stream]]
"""(address, replica) -> stream. From its return on the dispatcher may send to the replica, until `close` is called.
Raises grpc.aio.AioRpcError or WireError where the stream cannot be opened."""


class Links:
    """Owns an event loop on a thread of its own; adds to `replicas` and removes from it."""

    def __init__(
        self,
        directory: str,
        fingerprint: str,
        replicas: LiveReplicas,
        open_stream: OpenStream,
        tls: CurrentTls | None = None,
        directory_tls: TlsFiles | None = None,
    ) -> None:
        self._directory = directory
        self._directory_tls = directory_tls
        self._fingerprint = fingerprint
        self._replicas = replicas
        self._open_stream = open_stream
        self._tls = tls
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._addresses: dict[str, str] = {}
        self._pulses: dict[str, Pulse] = {}
        self._wants: dict[int, asyncio.Task[None]] = {}
        """Layer -> telling the directory that experts of it are missing, and the pause after that."""
        replicas.on_missing = self._note_missing
        self.shared = SharedLoop("expertmesh-links")
        self.shared.run(self._start())

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self.shared.loop

    def close(self) -> None:
        """Closes all streams and ends the thread. More calls do nothing."""
        if self.loop.is_closed():
            return
        self.shared.run(self._close(), 10)
        self.shared.close()

    async def _start(self) -> None:
        self._follower = asyncio.create_task(self._follow())
        self._prober = asyncio.create_task(self._probe())
        self._looker = asyncio.create_task(self._look())

    async def _look(self) -> None:
        """Sees to it that a replica that falls silent while no rows flow is not the one they go to next."""
        while True:
            await asyncio.sleep(LOOK_S)
            for replica_id, pulse in self._pulses.items():
                answered = pulse.look()
                if answered:
                    self._replicas.note_answer(replica_id)
                elif answered is False:
                    self._replicas.note_silence(replica_id)

    async def _probe(self) -> None:
        """Gives suspended replicas rows again once they answer."""
        while True:
            now = time.monotonic()
            due = [one.replica for one in self._replicas.suspended().values() if one.probe_at <= now]
            await asyncio.gather(*(self._try(replica.replica_id) for replica in due))
            await asyncio.sleep(PROBE_PERIOD_S)

    async def _try(self, replica_id: str) -> None:
        try:
            await self._describe(self._addresses[replica_id], PROBE_TIMEOUT_S)
        except (KeyError, grpc.aio.AioRpcError, ConfigError, FingerprintMismatch, WireError):
            self._replicas.postpone(replica_id)
        else:
            self._replicas.resume(replica_id)

    def _note_missing(self, layer: int, experts: frozenset[int]) -> None:
        """Called on any thread, as often as one likes."""
        if layer not in self._wants and not self.loop.is_closed():
            self.shared.call_soon(functools.partial(self._begin_want, layer, sorted(experts)))

    def _begin_want(self, layer: int, experts: list[int]) -> None:
        if layer not in self._wants:
            self._wants[layer] = asyncio.create_task(self._want(layer, experts))

    async def _want(self, layer: int, experts: list[int]) -> None:
        """At once, and again no sooner than in a second, so that the directory wakes who sleeps."""
        try:
            groups = await want(self._directory, layer, experts, tls=self._directory_tls)
            log.info("layer %d: rows wait for experts that nobody serves; woken: %s", layer, groups or "none")
            await asyncio.sleep(WANT_PERIOD_S)
        except ClusterError as error:
            log.info("layer %d: rows wait for experts that nobody serves; %s", layer, error)
            await asyncio.sleep(WANT_PERIOD_S)
        finally:
            del self._wants[layer]

    async def _follow(self) -> None:
        table: directory_pb2.Table | None = None
        async for received in watch(self._directory, self._directory_tls):
            table = merge(table, received)
            listed = {one.replica_id: one for one in table.replicas}
            self._addresses = {one.replica_id: one.address for one in table.replicas}
            for replica_id in self._tasks.keys() - listed.keys():
                self._tasks.pop(replica_id).cancel()
            for replica_id, replica in listed.items():
                if replica.state == pb.REPLICA_STATE_DRAINING:
                    self._pulses.pop(replica_id, None)  # it waits for quiet
                    self._replicas.remove(replica_id)
                elif replica.state == pb.REPLICA_STATE_READY and replica_id not in self._tasks:
                    self._tasks[replica_id] = asyncio.create_task(self._keep(replica))

    async def _keep(self, replica: directory_pb2.Replica) -> None:
        """Holds a stream to the replica open for as long as the directory lists it."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                reason = await self._serve(replica)
                pause = FIRST_PAUSE_S
            except (ConfigError, FingerprintMismatch, WireError) as error:
                reason = str(error)
                self._replicas.refused[replica.address] = reason
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            log.warning("replica %s at %s: %s", replica.replica_id, replica.address, reason)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)

    async def _serve(self, replica: directory_pb2.Replica) -> str:
        """Offers the replica to the dispatcher until its stream ends; returns why it ended."""
        description = await self._describe(replica.address)
        layers = experts_by_layer(replica.layers)
        live = LiveReplica(replica.replica_id, replica.group, layers, description.limits.max_rows)
        stream = await self._open_stream(replica.address, live)
        try:
            self._replicas.refused.pop(replica.address, None)
            self._replicas.add(live)
            self._pulses[live.replica_id] = Pulse(stream.ask, lambda: _idle(live))
            log.info("replica %s (group %s) at %s is in use", live.replica_id, live.group, replica.address)
            return await stream.ended()
        finally:
            self._pulses.pop(replica.replica_id, None)
            self._replicas.remove(replica.replica_id)
            await stream.close()

    async def _describe(self, address: str, timeout_s: float = DESCRIBE_TIMEOUT_S) -> pb.DescribeResponse:
        """What the replica serves; raises FingerprintMismatch, WireError where it speaks another protocol, and
        grpc.aio.AioRpcError where it does not answer."""
        async with open_channel(address, self._tls) as channel:
            stub = pb_grpc.ExpertServiceStub(channel)
            description: pb.DescribeResponse = await stub.Describe(pb.DescribeRequest(), timeout=timeout_s)
        if description.protocol_version != PROTOCOL_VERSION:
            raise WireError(f"speaks protocol {description.protocol_version}, this router {PROTOCOL_VERSION}")
        if description.fingerprint != self._fingerprint:
            raise FingerprintMismatch(
                f"serves model {description.fingerprint[:12]}, this router's is {self._fingerprint[:12]}"
            )
        return description

    async def _close(self) -> None:
        tasks = [self._follower, self._prober, self._looker, *self._tasks.values(), *self._wants.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if grpcs_own := asyncio.all_tasks() - {asyncio.current_task()}:  # they see to the end of cancelled calls
            await asyncio.wait(grpcs_own, timeout=1)


def _idle(live: LiveReplica) -> bool:
    live.refresh()
    return live.rows_under_way == 0
