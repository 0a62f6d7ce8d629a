"""One long-lived Dispatch stream to one replica."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from expertmesh.errors import FingerprintMismatch, WireError
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.v1 import expert_pb2_grpc as pb_grpc
from expertmesh.wire.channel import CHANNEL_OPTIONS, FINGERPRINT_KEY, PROTOCOL_VERSION
from expertmesh.wire.tensors import decode
from router_service.transport.base import Answer, Timing

CONNECT_TIMEOUT_S = 5.0


class ReplicaStream:
    """Lives on one event loop. `exchange` may be called many times at once; answers are matched by id."""

    def __init__(self, address: str, fingerprint: str, on_load: Callable[[pb.Load], None]) -> None:
        self.address = address
        self._fingerprint = fingerprint
        self._on_load = on_load
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.ExpertServiceStub(self._channel)
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[pb.DispatchResponse]] = {}
        self._writing = asyncio.Lock()
        self._call: Any = None

    async def connect(self) -> pb.DescribeResponse:
        """Asks what the replica serves and opens the stream.

        Raises FingerprintMismatch where it is another model, WireError where it speaks another protocol, and
        grpc.aio.AioRpcError where it does not answer.
        """
        description = await self._stub.Describe(pb.DescribeRequest(), timeout=CONNECT_TIMEOUT_S)
        if description.protocol_version != PROTOCOL_VERSION:
            raise WireError(f"speaks protocol {description.protocol_version}, this router {PROTOCOL_VERSION}")
        if description.fingerprint != self._fingerprint:
            raise FingerprintMismatch(
                f"serves model {description.fingerprint[:12]}, this router's is {self._fingerprint[:12]}"
            )
        self._call = self._stub.Dispatch(metadata=((FINGERPRINT_KEY, self._fingerprint),))
        return description

    async def read(self) -> str:
        """Hands answers to their callers until the stream ends; returns why it did. All who wait are told so."""
        reason = "the replica ended the stream"
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                waiting = self._waiting.get(response.id)
                if waiting is not None and not waiting.done():
                    waiting.set_result(response)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        finally:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(ConnectionError(reason))
        return reason

    async def exchange(self, request: pb.DispatchRequest, timeout_s: float) -> Answer:
        """Sends one request and waits for its answer; every failure is an answer too."""
        request.id = next(self._ids)
        request.timeout_us = int(timeout_s * 1e6)
        waiting: asyncio.Future[pb.DispatchResponse] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = waiting
        began = time.monotonic()
        try:
            async with self._writing:
                await self._call.write(request)
            response = await asyncio.wait_for(waiting, timeout_s)
        except TimeoutError:
            return Answer(pb.CODE_DEADLINE_EXCEEDED, f"no answer within {timeout_s:g} s")
        except (ConnectionError, grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            return Answer(pb.CODE_UNAVAILABLE, str(error) or type(error).__name__)
        finally:
            self._waiting.pop(request.id, None)
            if not waiting.done():
                waiting.cancel()
        self._on_load(response.load)
        return _to_answer(request, response, int((time.monotonic() - began) * 1e6))

    async def close(self) -> None:
        if self._call is not None:
            self._call.cancel()
        await self._channel.close()


def _to_answer(request: pb.DispatchRequest, response: pb.DispatchResponse, round_trip_us: int) -> Answer:
    """Checks the response against what was asked: another shape or type counts as a failure of the replica."""
    if response.status.code != pb.CODE_OK:
        return Answer(response.status.code, response.status.message)
    sent = request.hidden_states
    try:
        output = decode(response.output, "output")
    except WireError as error:
        return Answer(pb.CODE_INTERNAL, str(error))
    if output.shape != (sent.rows, sent.width) or response.output.dtype != request.output_dtype:
        return Answer(
            pb.CODE_INTERNAL, f"answered {tuple(output.shape)} {output.dtype} for {sent.rows} x {sent.width} rows"
        )
    timing = Timing(round_trip_us, response.timings.queue_us, response.timings.compute_us)
    return Answer(pb.CODE_OK, output=output, timing=timing)
