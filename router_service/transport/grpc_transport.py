"""The gRPC transport: follows the directory, keeps a stream to every replica, exchanges batches."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import grpc.aio
import torch

from expertmesh.directory.client import watch
from expertmesh.directory.table import merge
from expertmesh.errors import FingerprintMismatch, WireError
from expertmesh.v1 import directory_pb2
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.tensors import encode
from router_service.dispatch.scatter import ReplicaBatch
from router_service.replicas import LiveReplica, LiveReplicas, experts_by_layer
from router_service.transport.base import Answer
from router_service.transport.stream import ReplicaStream

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 2.0
"""Between attempts to reach a replica that the directory lists."""


@dataclass(frozen=True, slots=True)
class GrpcPending:
    futures: list[concurrent.futures.Future[Answer]]

    def wait(self) -> list[Answer]:
        return [_result(future) for future in self.futures]


class GrpcTransport:
    """Owns an event loop on a thread of its own, so that it may be used from any thread and process."""

    def __init__(self, directory: str, fingerprint: str, replicas: LiveReplicas, timeout_s: float = 30.0) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._streams: dict[str, tuple[ReplicaStream, LiveReplica]] = {}
        self._links: dict[str, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="expertmesh-transport", daemon=True)
        self._thread.start()
        self._follower = asyncio.run_coroutine_threadsafe(self._follow(), self._loop)

    def start(self, layer: int, hidden_states: torch.Tensor, batches: Sequence[ReplicaBatch]) -> GrpcPending:
        """Sends each batch's rows of hidden_states [T, H]; copies them once to the host and once into the message."""
        host = hidden_states.detach().cpu()
        return GrpcPending([self._submit(batch, _request(layer, host, batch)) for batch in batches])

    def close(self) -> None:
        """Ends the streams and the thread."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _submit(self, batch: ReplicaBatch, request: pb.DispatchRequest) -> concurrent.futures.Future[Answer]:
        return asyncio.run_coroutine_threadsafe(self._exchange(batch.replica, request), self._loop)

    async def _exchange(self, replica_id: str, request: pb.DispatchRequest) -> Answer:
        if replica_id not in self._streams:
            return Answer(pb.CODE_UNAVAILABLE, "no stream to it")
        stream, live = self._streams[replica_id]
        rows = request.hidden_states.rows
        live.rows_under_way += rows
        live.rows_sent += rows
        try:
            return await stream.exchange(request, self._timeout_s)
        finally:
            live.rows_under_way -= rows

    async def _follow(self) -> None:
        table: directory_pb2.Table | None = None
        async for received in watch(self._directory):
            table = merge(table, received)
            listed = {one.replica_id: one for one in table.replicas}
            for replica_id in self._links.keys() - listed.keys():
                self._links.pop(replica_id).cancel()
            for replica_id, replica in listed.items():
                if replica.state == pb.REPLICA_STATE_DRAINING:
                    self._replicas.remove(replica_id)
                elif replica.state == pb.REPLICA_STATE_READY and replica_id not in self._links:
                    self._links[replica_id] = asyncio.create_task(self._keep(replica))

    async def _keep(self, replica: directory_pb2.Replica) -> None:
        """Holds a stream to the replica open for as long as the directory lists it."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                reason = await self._serve(replica)
                pause = FIRST_PAUSE_S
            except (FingerprintMismatch, WireError) as error:
                reason = str(error)
                self._replicas.refused[replica.address] = reason
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            log.warning("replica %s at %s: %s", replica.replica_id, replica.address, reason)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)

    async def _serve(self, replica: directory_pb2.Replica) -> str:
        """Connects, offers the replica to the dispatcher until its stream ends, and returns why it ended."""
        live = LiveReplica(replica.replica_id, replica.group, experts_by_layer(replica.layers), 1)

        def note_load(load: pb.Load) -> None:
            live.queued_rows = max(0, load.queued_rows - live.rows_under_way)

        stream = ReplicaStream(replica.address, self._fingerprint, note_load)
        try:
            description = await stream.connect()
            live.max_rows = description.limits.max_rows
            self._replicas.refused.pop(replica.address, None)
            self._streams[replica.replica_id] = stream, live
            self._replicas.add(live)
            log.info("replica %s (group %s) at %s is in use", live.replica_id, live.group, replica.address)
            return await stream.read()
        finally:
            self._replicas.remove(replica.replica_id)
            self._streams.pop(replica.replica_id, None)
            await stream.close()

    async def _close(self) -> None:
        self._follower.cancel()
        links = list(self._links.values())
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)


def _result(future: concurrent.futures.Future[Answer]) -> Answer:
    try:
        return future.result()
    except concurrent.futures.CancelledError:  # a write was under way when the stream was closed
        return Answer(pb.CODE_UNAVAILABLE, "its stream was closed")


def _request(layer: int, host: torch.Tensor, batch: ReplicaBatch) -> pb.DispatchRequest:
    rows = encode(host if len(batch.rows) == len(host) else host[torch.from_numpy(batch.rows)])
    return pb.DispatchRequest(
        layer=layer,
        hidden_states=rows,
        pair_rows=encode(torch.from_numpy(batch.pair_rows)),
        pair_experts=encode(torch.from_numpy(batch.pair_experts)),
        pair_weights=encode(torch.from_numpy(batch.pair_weights)),
        output_dtype=rows.dtype,
    )
