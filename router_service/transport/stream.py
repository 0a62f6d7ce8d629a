"""One long-lived Dispatch stream to one replica."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio

from expertmesh.v1 import expert_pb2 as pb
from expertmesh.v1 import expert_pb2_grpc as pb_grpc
from expertmesh.wire.channel import FINGERPRINT_KEY, open_channel
from expertmesh.wire.checksum import find_change, request_checksum
from expertmesh.wire.tls import CurrentTls
from router_service.latency import Latency
from router_service.replicas import LiveReplica
from router_service.transport.pulse import NO_LAYER, Answered


@dataclass(frozen=True, slots=True)
class Reply:
    """A response, or why there is none or it is not to be believed."""

    response: pb.DispatchResponse | None
    code: pb.Code.ValueType = pb.CODE_OK
    message: str = ""
    round_trip_us: int = 0


OnReply = Callable[[Reply], object]


@dataclass(frozen=True, slots=True)
class Waiting:
    rows: int
    sent_at: float
    on_reply: OnReply


class ReplicaStream:
    """Lives on one event loop. Any number of requests may be open; replies are matched by id."""

    def __init__(
        self,
        address: str,
        fingerprint: str,
        live: LiveReplica,
        tls: CurrentTls | None = None,
        checksums: bool = False,
        peer: Latency | None = None,
    ) -> None:
        """`peer`: of a replica that is like this one, which is expected of it until it has answered itself."""
        self._live = live
        self._checksums = checksums
        self._channel = open_channel(address, tls)
        stub = pb_grpc.ExpertServiceStub(self._channel)
        self._call: Any = stub.Dispatch(metadata=((FINGERPRINT_KEY, fingerprint),))
        self._ids = itertools.count(1)
        self._waiting: dict[int, Waiting] = {}
        self._unwritten: deque[pb.DispatchRequest] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._why_ended: str | None = None
        self.latency = Latency(peer)

    def send(self, request: pb.DispatchRequest, on_reply: OnReply) -> int:
        """Sends it as soon as what was sent before is written; every failure is a reply too. Returns its id."""
        request.id = next(self._ids)
        if self._why_ended is not None:
            on_reply(Reply(None, pb.CODE_UNAVAILABLE, self._why_ended))
            return request.id
        if self._checksums:
            request.checksum = request_checksum(request)
        rows = request.hidden_states.rows
        self._live.rows_under_way += rows
        self._live.rows_sent += rows
        self._waiting[request.id] = Waiting(rows, time.monotonic(), on_reply)
        self._unwritten.append(request)
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        return request.id

    def ask(self) -> Answered:
        replies: list[Reply] = []
        self.send(pb.DispatchRequest(layer=NO_LAYER), replies.append)
        return lambda: any(reply.response is not None for reply in replies)

    def late_after_s(self, rows: int) -> float:
        """From when on an answer to so many rows is late."""
        return self.latency.late_after_s(rows)

    def give_up(self, request_id: int, reply: Reply) -> None:
        """Replies in the replica's stead, unless it has; what it still answers is ignored."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            self._live.rows_under_way -= waiting.rows
            waiting.on_reply(reply)

    async def ended(self) -> str:
        """Hands replies to those who wait until the stream ends; returns why it did. All who wait are told so."""
        reason = "its stream was closed"
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                if response is None:  # what grpc.aio gives for bytes that are no message
                    reason = "it sent an answer that is no DispatchResponse"
                    return reason
                self._receive(response)
            reason = "the replica ended the stream"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        finally:
            self._why_ended = reason
            for request_id in tuple(self._waiting):
                self.give_up(request_id, Reply(None, pb.CODE_UNAVAILABLE, reason))
        return reason

    async def close(self) -> None:
        self._call.cancel()
        if self._writer is not None:
            self._writer.cancel()
        await self._channel.close()

    async def _write(self) -> None:
        try:
            while self._unwritten:
                await self._call.write(self._unwritten.popleft())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._unwritten.clear()  # the stream has ended, of which its reader tells those who wait
        finally:
            self._writer = None

    def _receive(self, response: pb.DispatchResponse) -> None:
        waiting = self._waiting.pop(response.id, None)
        if waiting is None:
            return
        live = self._live
        live.rows_under_way -= waiting.rows
        live.queued_rows = max(0, response.load.queued_rows - live.rows_under_way)
        if self._checksums and (change := find_change(response)):
            waiting.on_reply(Reply(response, pb.CODE_DATA_LOSS, change))
            return
        round_trip_s = time.monotonic() - waiting.sent_at
        if response.status.code == pb.CODE_OK:
            self.latency.note(waiting.rows, round_trip_s)
        round_trip_us = int(round_trip_s * 1e6)
        waiting.on_reply(Reply(response, round_trip_us=round_trip_us))
