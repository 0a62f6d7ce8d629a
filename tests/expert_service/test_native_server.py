"""What only the native server has: buffers that are used again, batches of one type, two threads that take turns."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from marks import native_core
from numpy.typing import NDArray

from expert_service.endpoint import Offer, make_endpoint
from expert_service.executor import Executor, Pairs
from expert_service.request import Served
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.channel import CHANNEL_OPTIONS, FINGERPRINT_KEY
from expertmesh.wire.tensors import decode, encode

native_core()
from expert_service.native_endpoint import NativeEndpoint  # noqa: E402 only where there is a native core

SERVICE = "expertmesh.v1.ExpertService"
METADATA = ((FINGERPRINT_KEY, "f"),)
HIDDEN = 16


class Doubles(Executor):
    """Twice the rows, in the type that a test wants; keeps what it was given and waits while it is told to."""

    def __init__(self) -> None:
        self.output_dtype = torch.float32
        self.layout: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows
        self.opened = threading.Event()
        self.opened.set()
        self.began = threading.Semaphore(0)
        self.batches: list[tuple[int, int, torch.dtype]] = []
        self.pairs: list[Pairs] = []

    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        self.batches.append((layer, len(hidden_states), hidden_states.dtype))
        self.pairs.append(Pairs(pairs.rows.copy(), pairs.experts.copy(), pairs.weights.copy()))
        doubled = (2 * hidden_states.float()).to(self.output_dtype)
        self.began.release()
        assert self.opened.wait(60)
        return self.layout(doubled)


@contextmanager
def serving(executor: Executor, hidden_size: int, held: NDArray[numpy.bool_]) -> Iterator[tuple[str, NativeEndpoint]]:
    """The address of an endpoint that holds the same experts in layers 1 and 2."""
    description = pb.DescribeResponse(replica_id="r", group="g", fingerprint="f", hidden_size=hidden_size)
    offer = Offer(description, Served(hidden_size, {1: held, 2: held}, 4096, 8192), 65536, 1)
    endpoint = make_endpoint(offer, executor, "native")
    assert isinstance(endpoint, NativeEndpoint)
    endpoint.set_state(pb.REPLICA_STATE_READY)
    try:
        yield endpoint.listen("127.0.0.1", None), endpoint
    finally:
        endpoint.close(10)
        endpoint.stop(1)


@pytest.fixture
def served() -> Iterator[tuple[str, NativeEndpoint, Doubles]]:
    executor = Doubles()
    with serving(executor, HIDDEN, numpy.ones(4, dtype=numpy.bool_)) as (address, endpoint):
        yield address, endpoint, executor
        executor.opened.set()


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def request(number: int, hidden_states: torch.Tensor, layer: int = 1) -> pb.DispatchRequest:
    count = len(hidden_states)
    return pb.DispatchRequest(
        id=number,
        layer=layer,
        hidden_states=encode(hidden_states),
        pair_rows=encode(torch.arange(count, dtype=torch.int32)),
        pair_experts=encode(torch.full((count,), number % 4, dtype=torch.int32)),
        pair_weights=encode(torch.full((count,), float(number))),
        output_dtype=pb.DTYPE_FLOAT32,
    )


def run(address: str, test: Callable[[Any], Awaitable[None]]) -> None:
    """Runs a test with an open stream."""

    async def with_stream() -> None:
        async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
            dispatch = channel.stream_stream(
                f"/{SERVICE}/Dispatch",
                request_serializer=pb.DispatchRequest.SerializeToString,
                response_deserializer=pb.DispatchResponse.FromString,
            )
            async with asyncio.timeout(60):
                await test(dispatch(metadata=METADATA))

    asyncio.run(with_stream())


async def read(call: Any, count: int) -> dict[int, pb.DispatchResponse]:
    answers = [await call.read() for _ in range(count)]
    return {answer.id: answer for answer in answers}


def check(answer: pb.DispatchResponse, sent: torch.Tensor) -> None:
    assert answer.status.code == pb.CODE_OK, answer.status
    assert torch.equal(decode(answer.output), 2 * sent.float())


Server = tuple[str, NativeEndpoint, Doubles]


@pytest.mark.parametrize("sizes", [[1, 4000, 1, 3, 4096, 2], [5] * 300, [*range(1, 400, 7)]])
def test_buffers_that_grow_shrink_and_are_used_again_hold_the_right_rows(served: Server, sizes: list[int]) -> None:
    address, _, executor = served

    async def test(call: Any) -> None:
        for number, size in enumerate(sizes):
            sent = rows(size, number)
            await call.write(request(number, sent))
            check((await read(call, 1))[number], sent)
            assert executor.pairs[-1].rows.tolist() == list(range(size))
            assert set(executor.pairs[-1].weights.tolist()) == {float(number)}

    run(address, test)


def test_waiting_requests_form_one_batch_per_layer_and_type(served: Server) -> None:
    address, _, executor = served
    sent = {
        1: (1, rows(2, 1)),
        2: (1, rows(3, 2)),
        3: (2, rows(4, 3)),
        4: (1, rows(5, 4).bfloat16()),
        5: (1, rows(6, 5).half()),
    }

    async def test(call: Any) -> None:
        executor.opened.clear()
        await call.write(request(0, rows(1)))
        await asyncio.to_thread(executor.began.acquire)
        for number, (layer, hidden_states) in sent.items():
            await call.write(request(number, hidden_states, layer))
        while served[1].load().queued_rows < 20:
            await asyncio.sleep(0.005)
        executor.opened.set()
        answers = await read(call, 6)
        for number, (_, hidden_states) in sent.items():
            check(answers[number], hidden_states)
        assert executor.batches == [
            (1, 1, torch.float32), (1, 5, torch.float32), (2, 4, torch.float32), (1, 5, torch.bfloat16),
            (1, 6, torch.float16),
        ]  # fmt: skip
        joined = executor.pairs[1]
        assert joined.rows.tolist() == [0, 1, 2, 3, 4] and joined.experts.tolist() == [1, 1, 2, 2, 2]
        assert joined.weights.tolist() == [1, 1, 2, 2, 2]

    run(address, test)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [pb.DTYPE_FLOAT32, pb.DTYPE_BFLOAT16, pb.DTYPE_FLOAT16])
def test_any_output_type_is_rounded_as_torch_does(
    served: Server, dtype: torch.dtype, asked: pb.DType.ValueType
) -> None:
    address, _, executor = served
    executor.output_dtype = dtype
    # 1,025 rows: more than one piece of the conversion, and an odd rest
    sent = rows(1025) * torch.logspace(-9, 4, 1025)[:, None]

    async def test(call: Any) -> None:
        wanted = request(1, sent)
        wanted.output_dtype = asked
        await call.write(wanted)
        output = decode((await read(call, 1))[1].output)
        assert torch.equal(output, (2 * sent).to(dtype).to(output.dtype))

    run(address, test)


def test_an_output_of_any_layout_is_sent_row_by_row(served: Server) -> None:
    address, _, executor = served
    executor.layout = lambda doubled: doubled.t().contiguous().t()

    async def test(call: Any) -> None:
        await call.write(request(1, rows(7)))
        check((await read(call, 1))[1], rows(7))

    run(address, test)


def test_an_output_of_another_shape_is_a_failure_not_a_wrong_answer(served: Server) -> None:
    address, _, executor = served
    executor.layout = lambda doubled: doubled[:-1]

    async def test(call: Any) -> None:
        await call.write(request(1, rows(3)))
        status = (await read(call, 1))[1].status
        assert (status.code, status.message) == (pb.CODE_INTERNAL, "ValueError: the executor made (2, 16) of (3, 16)")

    run(address, test)


def test_many_requests_at_once_are_all_answered(served: Server) -> None:
    """A stream whose caller does not wait for its answers, and one that then does."""
    address, _, _ = served

    async def test(call: Any) -> None:
        for turn in range(5):
            numbers = range(1000 * turn, 1000 * turn + 200)
            for number in numbers:
                await call.write(request(number, rows(1 + number % 3, number)))
            answers = await read(call, len(numbers))
            for number in numbers:
                check(answers[number], rows(1 + number % 3, number))
            for number in range(3):
                await call.write(request(number, rows(2, number)))
                check((await read(call, 1))[number], rows(2, number))

    run(address, test)


def test_health_is_watched_and_changes_are_told(served: Server) -> None:
    address, endpoint, _ = served
    status = health_pb2.HealthCheckResponse
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watching = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=60)
        stranger = stub.Watch(health_pb2.HealthCheckRequest(service="stranger"), timeout=60)
        assert next(watching).status == status.SERVING and next(stranger).status == status.SERVICE_UNKNOWN
        endpoint.set_state(pb.REPLICA_STATE_DRAINING)
        assert next(watching).status == status.NOT_SERVING
        endpoint.close(10)
        endpoint.stop(1)
        with pytest.raises(grpc.RpcError):
            next(watching)


def test_reflection_answers_while_a_batch_is_computed_and_malformed_messages_end_it(served: Server) -> None:
    address, _, executor = served
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE).SerializeToString()

    async def test(call: Any) -> None:
        executor.opened.clear()
        await call.write(request(1, rows(1)))
        await asyncio.to_thread(executor.began.acquire)
        async with grpc.aio.insecure_channel(address) as channel:
            reflecting: Any = channel.stream_stream(method)()
            await reflecting.write(asked)
            answer = reflection_pb2.ServerReflectionResponse.FromString(await reflecting.read())
            assert answer.file_descriptor_response.file_descriptor_proto
            await reflecting.write(b"\xff")
            assert await reflecting.code() == grpc.StatusCode.INVALID_ARGUMENT
        executor.opened.set()
        check((await read(call, 1))[1], rows(1))

    run(address, test)


def test_a_replica_that_is_closed_refuses_and_finishes_what_it_has(served: Server) -> None:
    address, endpoint, executor = served

    async def test(call: Any) -> None:
        executor.opened.clear()
        await call.write(request(1, rows(1)))
        await asyncio.to_thread(executor.began.acquire)
        endpoint.close(0)
        await call.write(request(2, rows(2)))
        refused = (await read(call, 1))[2].status
        assert (refused.code, refused.message) == (pb.CODE_UNAVAILABLE, "replica r is stopping")
        executor.opened.set()
        check((await read(call, 1))[1], rows(1))

    run(address, test)


def test_stopping_under_a_computation_ends_the_stream_and_later_the_thread(served: Server) -> None:
    address, endpoint, executor = served

    async def test(call: Any) -> None:
        executor.opened.clear()
        await call.write(request(1, rows(1)))
        await asyncio.to_thread(executor.began.acquire)
        endpoint.close(0)
        await asyncio.to_thread(endpoint.stop, 0.1)
        assert await call.read() is grpc.aio.EOF

    run(address, test)
    assert endpoint.problem() is None
    executor.opened.set()
    endpoint.close(60)
    assert endpoint.problem() == "the executor's thread has ended"


def test_an_idle_replica_uses_no_cpu(served: Server, tmp_path: Path) -> None:
    """Nothing spins: less than a twentieth of one core, whatever else the test process does."""
    address, _, _ = served

    async def test(call: Any) -> None:
        await call.write(request(1, rows(1)))
        await read(call, 1)
        await asyncio.sleep(0.1)
        began, used = time.monotonic(), time.process_time()
        await asyncio.sleep(2)
        assert time.process_time() - used < 0.05 * (time.monotonic() - began)

    run(address, test)
