"""The calls of ExpertService: from bytes to waiting jobs, and answers back on the stream they belong to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from expert_service.batcher import Batcher
from expert_service.request import Refusal, Served, parse
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.v1 import expert_pb2_grpc
from expertmesh.wire.channel import FINGERPRINT_KEY
from expertmesh.wire.checksum import answer_checksum

Context = grpc.aio.ServicerContext[Any, Any]


class Stream:
    """One Dispatch stream. All its methods run on the server's event loop; `gone` may be read from any thread."""

    def __init__(self, max_open_rows: int) -> None:
        self.gone = False
        self.waiting = 0
        """Requests that are not answered yet."""
        self.open_rows = 0
        """Rows of all requests whose answers are not sent yet; one at least for each, so that none is free."""
        self._max_open_rows = max_open_rows
        self._unsent: asyncio.Queue[tuple[pb.DispatchResponse, int] | None] = asyncio.Queue()
        self._progress = asyncio.Event()

    def open(self, rows: int) -> None:
        """A request of `rows` rows came, and will be answered."""
        self.waiting += 1
        self.open_rows += max(1, rows)

    def answer(self, response: pb.DispatchResponse, rows: int) -> None:
        self.waiting -= 1
        self._unsent.put_nowait((response, rows))
        self._progress.set()

    def end(self) -> None:
        """Ends the stream once what is already answered has been sent."""
        self._unsent.put_nowait(None)

    async def send_answers(self, context: Context) -> None:
        while (answer := await self._unsent.get()) is not None:
            response, rows = answer
            await context.write(response)
            self.open_rows -= max(1, rows)
            self._progress.set()

    async def room(self) -> None:
        """Returns once the caller has read enough of its answers: one that reads none is not read from either."""
        while self.open_rows > self._max_open_rows:
            await self._next_progress()

    async def all_answered(self) -> None:
        while self.waiting:
            await self._next_progress()

    async def _next_progress(self) -> None:
        self._progress.clear()
        await self._progress.wait()


class ExpertServicer(expert_pb2_grpc.ExpertServiceServicer):
    def __init__(
        self, offered: pb.DescribeResponse, served: Served, batcher: Batcher,
        describe: Callable[[], pb.DescribeResponse], load: Callable[[], pb.Load],
    ) -> None:  # fmt: skip
        self.streams: set[Stream] = set()
        self.last_request_at = float("-inf")
        """Monotonic seconds."""
        self._offered = offered
        self._served = served
        self._batcher = batcher
        self._describe = describe
        self._load = load

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        return self._describe()

    async def Dispatch(self, request_iterator: Any, context: Context) -> None:  # type: ignore[override]
        await self._check_fingerprint(context)
        # one batch that is computed and a full queue: what comes on top is pushed back in band, not left unread
        stream = Stream(2 * self._batcher.max_queued_rows)
        self.streams.add(stream)
        reader = asyncio.create_task(self._read_requests(stream, context))
        try:
            await stream.send_answers(context)
        finally:
            stream.gone = True
            self.streams.discard(stream)
            reader.cancel()
        if reader.done() and not reader.cancelled():
            try:
                reader.result()
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a message is no DispatchRequest")

    async def _check_fingerprint(self, context: Context) -> None:
        metadata = dict(context.invocation_metadata() or ())
        asked = str(metadata.get(FINGERPRINT_KEY) or "none")
        ours = self._offered.fingerprint
        if asked != ours:
            who = f"replica {self._offered.replica_id} of group {self._offered.group}"
            detail = f"{who} serves the model with fingerprint {ours}, the caller asks for {asked}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, detail)

    async def _read_requests(self, stream: Stream, context: Context) -> None:
        try:
            while (request := await context.read()) is not grpc.aio.EOF:
                self._accept(stream, request)
                await stream.room()
            await stream.all_answered()
        finally:
            stream.end()

    def _accept(self, stream: Stream, request: pb.DispatchRequest) -> None:
        self.last_request_at = now = time.monotonic()
        try:
            job = parse(request, self._served, stream, now)
        except Refusal as refusal:
            self._refuse(stream, request, refusal.code, str(refusal))
            return
        code = self._batcher.submit(job)
        if code == pb.CODE_OK:
            stream.open(job.rows)
        elif code == pb.CODE_RESOURCE_EXHAUSTED:
            waiting = f"{self._batcher.queued_rows} rows wait in a queue for {self._batcher.max_queued_rows}"
            self._refuse(stream, request, code, f"no room for {job.rows} rows: {waiting}")
        else:
            self._refuse(stream, request, code, f"replica {self._offered.replica_id} is stopping")

    def _refuse(self, stream: Stream, request: pb.DispatchRequest, code: pb.Code.ValueType, message: str) -> None:
        status = pb.Status(code=code, message=message)
        response = pb.DispatchResponse(id=request.id, status=status, load=self._load())
        if request.HasField("checksum"):
            response.checksum = answer_checksum(response)
        stream.open(0)
        stream.answer(response, 0)
