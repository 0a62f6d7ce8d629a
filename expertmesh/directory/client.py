"""How the others use the directory: read it once, follow it, announce themselves to it.

Each takes its host:port and, where it asks for certificates, the cluster's TLS files: a process that finds them unfit
when it looks first gets a ConfigError. Connections carry no keep-alive pings, which Ray Serve's proxy takes for abuse;
a watch that stays silent for longer than several heartbeats is opened again instead.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from expertmesh.args import DIRECTORY_APPLICATION
from expertmesh.directory.directory import HEARTBEAT_S
from expertmesh.errors import ClusterError
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import directory_pb2_grpc
from expertmesh.wire.channel import MAX_MESSAGE_BYTES, client_side, open_channel
from expertmesh.wire.tls import CurrentTls, TlsBytes, TlsFiles

logger = logging.getLogger(__name__)
Reply = TypeVar("Reply")

METADATA = (("application", DIRECTORY_APPLICATION),)
"""Ray Serve's gRPC proxy finds the application by it."""
SILENCE_S = 4 * HEARTBEAT_S
MAX_BACKOFF_S = 2.0
EXPERT_ROWS_EVERY_S = 3.0
OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
]

_kept: dict[tuple[str, TlsFiles | None], tuple[grpc.Channel, TlsBytes | None]] = {}


def list_table(address: str, timeout_s: float = 5.0, tls: TlsFiles | None = None) -> pb.Table:
    """The directory's table; raises ClusterError where it does not answer in time."""
    return _call(address, "List", pb.ListRequest(), pb.Table, timeout_s, tls)


def expert_load(
    address: str, window_s: float, timeout_s: float = 5.0, tls: TlsFiles | None = None
) -> pb.ExpertLoadReply:
    """Rows that each expert got in the window that ends now, 0 to 600 s; 0: since each live replica began.

    Raises ClusterError where the directory does not answer in time, or refuses the window.
    """
    return _call(address, "ExpertLoad", pb.ExpertLoadRequest(window_s=window_s), pb.ExpertLoadReply, timeout_s, tls)


def scaling(address: str, timeout_s: float = 5.0, tls: TlsFiles | None = None) -> pb.ScalingReply:
    """The last decisions for each group; raises ClusterError where the directory does not answer in time."""
    return _call(address, "Scaling", pb.ScalingRequest(), pb.ScalingReply, timeout_s, tls)


def report_decision(
    address: str, decision: pb.ScalingDecision, timeout_s: float = 2.0, tls: TlsFiles | None = None
) -> None:
    """Tells what was decided for a group; raises ClusterError where the directory does not answer in time or refuses.

    For who calls often: the connection stays open, one for each address of the process.
    """
    stub = directory_pb2_grpc.DirectoryServiceStub(_kept_channel(address, tls))
    try:
        stub.ReportDecision(decision, timeout=timeout_s, metadata=METADATA)
    except grpc.RpcError as error:
        raise ClusterError(f"directory at {address} does not take a decision: {_reason(error)}") from None


async def want(
    address: str, layer: int, experts: Sequence[int], timeout_s: float = 5.0, tls: TlsFiles | None = None
) -> list[str]:
    """Asks that groups which hold one of the experts and have no replica be woken; their names. Raises ClusterError
    where the directory does not answer in time."""
    request = pb.WantRequest(layer=layer, experts=experts)
    try:
        async with open_channel(address, _current(tls), OPTIONS) as channel:
            stub = directory_pb2_grpc.DirectoryServiceStub(channel)
            reply: pb.WantResponse = await stub.Want(request, timeout=timeout_s, metadata=METADATA)
            return list(reply.groups)
    except grpc.aio.AioRpcError as error:
        raise ClusterError(f"directory at {address} wakes nobody: {_reason(error)}") from None


def _kept_channel(address: str, tls: TlsFiles | None) -> grpc.Channel:
    """Another one once the files hold something else."""
    current = _current(tls)
    pem = current.read() if current else None
    channel, shown = _kept.get((address, tls), (None, None))
    if channel is not None and shown == pem:
        return channel
    if channel is not None:
        channel.close()
    channel = _open(address, tls)
    _kept[address, tls] = channel, pem
    return channel


def _open(address: str, tls: TlsFiles | None) -> grpc.Channel:
    current = _current(tls)
    if current is None:
        return grpc.insecure_channel(address, OPTIONS)
    credentials, more = client_side(current)
    return grpc.secure_channel(address, credentials, [*OPTIONS, *more])


@functools.cache
def _current(tls: TlsFiles | None) -> CurrentTls | None:
    """The process's one, so that files that are replaced just now trouble only who comes first."""
    return CurrentTls(tls) if tls else None


def _call(
    address: str, name: str, request: Message, answers: type[Reply], timeout_s: float, tls: TlsFiles | None
) -> Reply:
    """A proxy that is slow to shake hands is tried again, one that refuses the connection is not."""
    deadline = time.monotonic() + timeout_s
    with _open(address, tls) as channel:
        method = getattr(directory_pb2_grpc.DirectoryServiceStub(channel), name)
        while True:
            try:
                reply = method(request, timeout=max(0.1, deadline - time.monotonic()), metadata=METADATA)
                assert isinstance(reply, answers)
                return reply
            except grpc.RpcError as error:
                slow = error.code() == grpc.StatusCode.UNAVAILABLE and "refused" not in (error.details() or "")
                if not slow or time.monotonic() > deadline:
                    raise ClusterError(f"directory at {address} does not answer: {_reason(error)}") from None
            time.sleep(0.1)


async def watch(address: str, tls: TlsFiles | None = None) -> AsyncGenerator[pb.Table, None]:
    """The directory's tables as they come, for ever: a lost connection is opened again, after 0.1 to 2 s."""
    backoff_s = 0.1
    while True:
        try:
            async with open_channel(address, _current(tls), OPTIONS) as channel:
                call = directory_pb2_grpc.DirectoryServiceStub(channel).Watch(pb.WatchRequest(), metadata=METADATA)
                while True:
                    async with asyncio.timeout(SILENCE_S):
                        table = await call.read()
                    if not isinstance(table, pb.Table):
                        break
                    backoff_s = 0.1
                    yield table
            reason = "the stream ended"
        except grpc.aio.AioRpcError as error:
            reason = _reason(error)
        except TimeoutError:
            reason = f"silent for {SILENCE_S:.0f} s"
        logger.info("directory at %s: %s; watching again in about %.1f s", address, reason, backoff_s)
        await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
        backoff_s = min(MAX_BACKOFF_S, 2 * backoff_s)


class Announcer:
    """Keeps one replica's entry alive: announces it every third of the lease and at once after a change.

    `entry` gives the entry as of now, `layer_rows` its experts' counters, which are told every few seconds and after a
    change. All methods run on one event loop. A directory that is away is tried again with the same rhythm, for ever.
    """

    def __init__(
        self,
        address: str,
        lease_ms: int,
        entry: Callable[[], pb.Replica],
        layer_rows: Callable[[], Sequence[pb.LayerRows]] = tuple,
        tls: TlsFiles | None = None,
    ) -> None:
        self._address = address
        self._tls = _current(tls)
        self._lease_ms = lease_ms
        self._entry = entry
        self._layer_rows = layer_rows
        self._rows_due_at = float("-inf")
        self._rows_for = ""
        """The directory process that was told of rows last."""
        self._wake = asyncio.Event()
        self._reached: bool | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        self._open()
        self._task = asyncio.create_task(self._announce_forever())

    def _open(self) -> None:
        self._shown = self._tls and self._tls.read()
        self._channel = open_channel(self._address, self._tls, OPTIONS)
        self._stub = directory_pb2_grpc.DirectoryServiceStub(self._channel)

    def changed(self) -> None:
        """Announces at once."""
        self._rows_due_at = float("-inf")
        self._wake.set()

    async def stop(self) -> None:
        """Withdraws the entry; a directory that cannot be reached forgets it by its lease."""
        if self._task is None:
            return
        task, self._task = self._task, None
        task.cancel()
        await asyncio.wait([task])
        try:
            request = pb.WithdrawRequest(replica_id=self._entry().replica_id)
            await self._stub.Withdraw(request, timeout=2.0, metadata=METADATA)
        except grpc.aio.AioRpcError as error:
            logger.info("directory at %s: not withdrawn: %s", self._address, _reason(error))
        await self._channel.close()

    async def _announce_forever(self) -> None:
        interval_s = self._lease_ms / 3000
        while True:
            self._wake.clear()
            await self._announce(timeout_s=self._lease_ms / 1000)
            try:
                async with asyncio.timeout(interval_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _announce(self, timeout_s: float) -> None:
        if self._tls is not None and self._tls.read() != self._shown:
            await self._channel.close()
            self._open()
        now = time.monotonic()
        # half an interval early: announcements come in a rhythm of their own
        rows = self._layer_rows() if now >= self._rows_due_at - self._lease_ms / 6000 else ()
        # the entry after the counters, so that its total covers them
        request = pb.AnnounceRequest(replica=self._entry(), lease_ms=self._lease_ms, expert_rows=rows)
        try:
            reply = await self._stub.Announce(request, timeout=timeout_s, metadata=METADATA)
        except grpc.aio.AioRpcError as error:
            if self._reached is not False:
                logger.warning("directory at %s: not announced: %s; going on", self._address, _reason(error))
            self._reached = False
            return
        if rows:
            self._rows_due_at, self._rows_for = now + EXPERT_ROWS_EVERY_S, reply.directory_id
        elif reply.directory_id != self._rows_for:
            self._rows_due_at = float("-inf")
        if self._reached is False:
            logger.info("directory at %s: announced again", self._address)
        self._reached = True


def _reason(error: grpc.RpcError) -> str:
    details = (error.details() or "").strip().splitlines()
    return f"{error.code().name}{': ' + details[0] if details else ''}"
