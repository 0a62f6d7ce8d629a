"""One client's stream to one replica of the expert tier, opened again when it breaks."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import grpc
import grpc.aio

from expertmesh.errors import ClusterError
from expertmesh.v1 import directory_pb2
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.v1 import expert_pb2_grpc as pb_grpc
from expertmesh.wire.channel import FINGERPRINT_KEY, open_channel
from expertmesh.wire.tls import CurrentTls

CONNECT_TIMEOUT_S = 5.0
FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 2.0


class ReplicaLink:
    """Lives on one event loop. `send` returns at once, however little the replica reads; answers come as futures."""

    def __init__(self, entry: directory_pb2.Replica, tls: CurrentTls | None = None) -> None:
        self.replica_id = entry.replica_id
        self.group = entry.group
        self.layers = {layer.layer: frozenset(layer.experts) for layer in entry.layers}
        self.ready = entry.state == pb.REPLICA_STATE_READY
        """It wants new work, by the directory."""
        self.connected = False
        self.rows_under_way = 0
        self.description = pb.DescribeResponse()
        """What the replica said of itself when it was last connected."""
        self.problem = "not connected yet"
        """Why it is not connected."""
        self._address, self._tls = entry.address, tls
        self._metadata = ((FINGERPRINT_KEY, entry.fingerprint),)
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[pb.DispatchResponse]] = {}
        self._unsent: asyncio.Queue[pb.DispatchRequest] = asyncio.Queue()
        self._first_try = asyncio.Event()
        self._task = asyncio.create_task(self._keep())

    async def tried(self) -> None:
        """Returns once it is connected or the first attempt has failed."""
        await self._first_try.wait()

    def send(self, request: pb.DispatchRequest) -> asyncio.Future[pb.DispatchResponse]:
        """Sets the request's id. The future raises ConnectionError where the stream breaks first; cancel it when the
        answer is not wanted any more."""
        request.id = next(self._ids)
        waiting: asyncio.Future[pb.DispatchResponse] = asyncio.get_running_loop().create_future()
        if not self.connected:
            waiting.set_exception(ConnectionError(self.problem))
            return waiting
        rows = request.hidden_states.rows
        self.rows_under_way += rows
        self._waiting[request.id] = waiting
        waiting.add_done_callback(lambda _: self._forget(request.id, rows))
        self._unsent.put_nowait(request)
        return waiting

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    def _forget(self, request_id: int, rows: int) -> None:
        self._waiting.pop(request_id, None)
        self.rows_under_way -= rows

    async def _keep(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                async with open_channel(self._address, self._tls) as channel:
                    await self._serve(pb_grpc.ExpertServiceStub(channel))
                self.problem, pause_s = "the replica ended the stream", FIRST_PAUSE_S
            except grpc.aio.AioRpcError as error:
                self.problem = f"{error.code().name}: {(error.details() or '').partition(chr(10))[0]}"
            finally:
                self._disconnect()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    async def _serve(self, stub: Any) -> None:
        self.description = await stub.Describe(pb.DescribeRequest(), timeout=CONNECT_TIMEOUT_S)
        call = stub.Dispatch(metadata=self._metadata)
        writer = asyncio.create_task(self._write(call))
        try:
            self.connected = True
            self._first_try.set()
            while (response := await call.read()) is not grpc.aio.EOF:
                waiting = self._waiting.get(response.id)
                if waiting is not None and not waiting.done():
                    waiting.set_result(response)
        finally:
            writer.cancel()
            await asyncio.wait([writer])

    async def _write(self, call: Any) -> None:
        """A task of its own: a write that is cancelled takes the whole stream with it."""
        while True:
            await call.write(await self._unsent.get())

    def _disconnect(self) -> None:
        self.connected = False
        self._first_try.set()
        self._unsent = asyncio.Queue()
        for waiting in list(self._waiting.values()):
            if not waiting.done():
                waiting.set_exception(ConnectionError(self.problem))


async def model_of(links: list[ReplicaLink]) -> pb.DescribeResponse:
    """What the first replica to answer says of itself; raises ClusterError where none does."""
    await asyncio.gather(*(link.tried() for link in links))
    connected = [link for link in links if link.connected]
    if not connected:
        raise ClusterError(f"no replica answers; {links[0].replica_id}: {links[0].problem}")
    return connected[0].description
