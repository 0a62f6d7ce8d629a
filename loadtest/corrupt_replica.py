"""A replica whose answers are wrong: one more of its group in the directory, which hands what it is asked to a real one
and spoils the answers. Routers know it from no other until they look at what it says."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import grpc
import grpc.aio

from expertmesh.directory.client import Announcer
from expertmesh.v1 import directory_pb2, expert_pb2_grpc
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.channel import FINGERPRINT_KEY, SERVER_OPTIONS, open_channel, server_credentials
from expertmesh.wire.checksum import answer_checksum
from expertmesh.wire.tls import CurrentTls, TlsFiles
from loadtest.config import Corruption

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

SUFFIX = "-corrupt"
"""Of its id, which begins with that of the real replica."""
LEASE_MS = 3000
"""So long the directory remembers one that was killed."""
GRACE_S = 1.0
SAME_SIZE = {
    pb.DTYPE_FLOAT32: pb.DTYPE_INT32,
    pb.DTYPE_BFLOAT16: pb.DTYPE_FLOAT16,
    pb.DTYPE_FLOAT16: pb.DTYPE_BFLOAT16,
}
NAN = {
    pb.DTYPE_FLOAT32: bytes.fromhex("0000c07f"),
    pb.DTYPE_BFLOAT16: bytes.fromhex("c07f"),
    pb.DTYPE_FLOAT16: bytes.fromhex("007e"),
}


@contextmanager
def corrupt_replica(
    real: directory_pb2.Replica,
    what: Corruption,
    directory: str,
    tls: TlsFiles | None,
    directory_tls: TlsFiles | None = None,
) -> Iterator[CorruptReplica]:
    """Serves on the real replica's host and is in the directory while the context lasts.

    `directory_tls`: where the directory asks for a certificate. Raises ConfigError where a file of `tls` cannot serve.
    A directory that is away is tried again, as replicas do.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="corrupt-replica", daemon=True)
    thread.start()

    def run(coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    serving = AsyncExitStack()
    try:
        yield run(serving.enter_async_context(_serving(real, what, directory, tls, directory_tls)))
    finally:
        run(_close(serving))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _close(serving: AsyncExitStack) -> None:
    await serving.aclose()
    if grpcs_own := asyncio.all_tasks() - {asyncio.current_task()}:  # they see to the end of cancelled calls
        await asyncio.wait(grpcs_own, timeout=GRACE_S)


@asynccontextmanager
async def _serving(
    real: directory_pb2.Replica,
    what: Corruption,
    directory: str,
    tls: TlsFiles | None,
    directory_tls: TlsFiles | None,
) -> AsyncIterator[CorruptReplica]:
    shown = CurrentTls(tls) if tls else None
    credentials = server_credentials(shown) if shown else None
    server = grpc.aio.server(options=SERVER_OPTIONS)
    host = real.address.rpartition(":")[0]
    port = server.add_secure_port(f"{host}:0", credentials) if credentials else server.add_insecure_port(f"{host}:0")
    entry = directory_pb2.Replica(
        replica_id=f"{real.replica_id}-{uuid.uuid4().hex[:4]}{SUFFIX}",
        group=real.group,
        address=f"{host}:{port}",
        fingerprint=real.fingerprint,
        layers=real.layers,
        state=pb.REPLICA_STATE_READY,
        node_id=real.node_id,
        pid=os.getpid(),
        started_at=time.time(),
    )
    async with open_channel(real.address, shown) as channel:
        made = CorruptReplica(entry.replica_id, expert_pb2_grpc.ExpertServiceStub(channel), what)
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(made, server)
        await server.start()
        announcer = Announcer(directory, LEASE_MS, lambda: entry, tls=directory_tls)
        try:
            await announcer.start()
            yield made
        finally:
            await announcer.stop()
            await server.stop(GRACE_S)


class CorruptReplica(expert_pb2_grpc.ExpertServiceServicer):
    """Answers as the real replica does, but for its own id and for sums, which it spoils: as one that computes them
    wrongly would, whose checksum matches, or for `checksum` as if bytes had changed on the way."""

    def __init__(self, replica_id: str, real: Any, what: Corruption) -> None:
        self.answers = 0
        """That it has spoiled."""
        self._replica_id, self._real, self._what = replica_id, real, what

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        try:
            description: pb.DescribeResponse = await self._real.Describe(request)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")
        description.replica_id = self._replica_id
        return description

    async def Dispatch(self, request_iterator: Any, context: Context) -> AsyncIterator[pb.DispatchResponse]:
        told = [(key, value) for key, value in context.invocation_metadata() or () if key == FINGERPRINT_KEY]
        call = self._real.Dispatch(request_iterator, metadata=told)
        try:
            async for answer in call:
                if answer.status.code == pb.CODE_OK:
                    spoil(answer.output, self._what)
                    if self._what != "checksum" and answer.HasField("checksum"):
                        answer.checksum = answer_checksum(answer)
                    self.answers += 1
                yield answer
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")
        finally:
            call.cancel()


def spoil(sums: pb.Tensor, what: Corruption) -> None:
    """Takes the last row away, calls the elements another type of the same size, makes the first one a NaN, or flips
    its sign, which only a checksum tells. The message stays well-formed."""
    if what == "rows":
        sums.data = sums.data[: len(sums.data) - len(sums.data) // sums.rows]
        sums.rows -= 1
    elif what == "dtype":
        sums.dtype = SAME_SIZE[sums.dtype]
    elif what == "nan":
        nan = NAN[sums.dtype]
        sums.data = nan + sums.data[len(nan) :]
    else:
        data, sign = bytearray(sums.data), len(NAN[sums.dtype]) - 1
        data[sign] ^= 0x80
        sums.data = bytes(data)
