"""Batches that the native server computes without Python."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy
import pytest
import torch
from marks import native_core, needs_avx512_bf16
from test_native_server import run, serving

from expert_service.executor import Executor, Pairs
from expert_service.packing import pack_tiles
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.tensors import decode, encode

expertmesh_native = native_core()

HIDDEN, INTERMEDIATE, EXPERTS = 64, 96, 3
SLOTS = numpy.array([-1, 2, 0, -1, 1], numpy.int32)
HELD = [1, 2, 4]


class InPython(Executor):
    """Twice the rows, which no computation here gives."""

    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        return 2 * hidden_states


class Native(Executor):
    def __init__(self, computation: Any) -> None:
        self.computation = computation

    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        raise AssertionError("Python was called")


def request(x: torch.Tensor, pairs: Pairs, layer: int = 1, output: pb.DType.ValueType = pb.DTYPE_FLOAT32) -> Any:
    return pb.DispatchRequest(
        id=7,
        layer=layer,
        hidden_states=encode(x),
        pair_rows=encode(torch.from_numpy(pairs.rows)),
        pair_experts=encode(torch.from_numpy(pairs.experts)),
        pair_weights=encode(torch.from_numpy(pairs.weights)),
        output_dtype=output,
    )


def some_pairs(rows: int, generator: numpy.random.Generator) -> Pairs:
    """Two experts of each row."""
    experts = numpy.concatenate([generator.choice(HELD, 2, replace=False) for _ in range(rows)]).astype(numpy.int32)
    weights = generator.random(2 * rows, numpy.float32)
    return Pairs(numpy.repeat(numpy.arange(rows, dtype=numpy.int32), 2), experts, weights)


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count))


def experts() -> Any:
    """Of layer 1, the same every time."""
    generator = torch.Generator().manual_seed(5)
    packed = []
    for shape in ((EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)):
        weights = torch.randn(shape, generator=generator).bfloat16()
        packed.append(torch.empty_like(weights))
        for expert, tiles in zip(weights, packed[-1], strict=True):
            pack_tiles(expert, tiles)
    made = expertmesh_native.Experts()
    made.add_layer(1, *(one.view(torch.uint16) for one in packed), SLOTS)
    return made


@needs_avx512_bf16
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_of_any_type_get_the_sums_that_the_kernel_gives(dtype: torch.dtype) -> None:
    """Its weights are kept by the computation alone."""
    computation = experts()
    generator = numpy.random.default_rng(3)

    async def test(call: Any) -> None:
        for count in (1, 3, 64, 2):
            x, pairs = rows(count).to(dtype), some_pairs(count, generator)
            rounded = x.bfloat16()
            sums = torch.empty_like(rounded)
            columns = pairs.rows, pairs.experts, pairs.weights
            computation.run(1, rounded.data_ptr(), count, *columns, sums.data_ptr())
            await call.write(request(x, pairs))
            answer = await call.read()
            assert answer.status.code == pb.CODE_OK, answer.status
            assert torch.equal(decode(answer.output), sums.float()) and sums.abs().sum() > 0

    with serving(Native(computation), HIDDEN, SLOTS >= 0) as (address, _):
        run(address, test)


@pytest.mark.parametrize("output", [pb.DTYPE_FLOAT32, pb.DTYPE_BFLOAT16, pb.DTYPE_FLOAT16])
def test_an_echo_answers_with_the_rows_and_python_is_not_called(output: pb.DType.ValueType) -> None:
    x, pairs = rows(5), some_pairs(5, numpy.random.default_rng(1))

    async def test(call: Any) -> None:
        await call.write(request(x, pairs, output=output))
        answered = decode((await call.read()).output)
        assert torch.equal(answered, x.to(answered.dtype))

    with serving(Native(expertmesh_native.Echo()), HIDDEN, SLOTS >= 0) as (address, _):
        run(address, test)


def test_the_executor_can_be_exchanged_while_it_serves() -> None:
    x, pairs = rows(2), some_pairs(2, numpy.random.default_rng(1))

    async def test(call: Any) -> None:
        for executor, factor in [(InPython(), 2), (Native(expertmesh_native.Echo()), 1), (InPython(), 2)]:
            endpoint.executor = executor
            assert endpoint.executor is executor
            await call.write(request(x, pairs))
            assert torch.equal(decode((await call.read()).output), factor * x)

    with serving(Native(expertmesh_native.Echo()), HIDDEN, SLOTS >= 0) as (address, endpoint):
        run(address, test)


@needs_avx512_bf16
def test_what_a_computation_throws_is_the_answer_and_the_next_batch_is_computed() -> None:
    x, pairs = rows(2), some_pairs(2, numpy.random.default_rng(1))

    async def test(call: Any) -> None:
        await call.write(request(x, pairs, layer=2))
        status = (await call.read()).status
        assert (status.code, status.message) == (pb.CODE_INTERNAL, "layer 2 is not held")
        await call.write(request(x, pairs))
        assert (await call.read()).status.code == pb.CODE_OK

    with serving(Native(experts()), HIDDEN, SLOTS >= 0) as (address, _):
        run(address, test)


def test_weights_that_do_not_fit_are_refused() -> None:
    made = expertmesh_native.Experts()
    down = torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.uint16)
    gate_up = torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=torch.uint16)
    with pytest.raises(ValueError, match="that do not fit each other"):
        made.add_layer(1, gate_up[:, :-32].contiguous(), down, SLOTS)
    with pytest.raises(ValueError, match="no multiples of 32"):
        made.add_layer(1, gate_up[:, :, :-16].contiguous(), down[:, :-16].contiguous(), SLOTS)
    with pytest.raises(IndexError, match="a slot that no expert has"):
        made.add_layer(1, gate_up, down, SLOTS + 1)
    with pytest.raises(TypeError):
        made.add_layer(1, gate_up.float(), down, SLOTS)


def test_a_replica_that_polled_for_a_busy_caller_sleeps_once_the_caller_rests() -> None:
    x, pairs = rows(1), some_pairs(1, numpy.random.default_rng(1))

    async def test(call: Any) -> None:
        for _ in range(300):
            await call.write(request(x, pairs))
            await call.read()
        await asyncio.sleep(0.1)
        began, used = time.monotonic(), time.process_time()
        await asyncio.sleep(1)
        assert time.process_time() - used < 0.1 * (time.monotonic() - began)

    with serving(Native(expertmesh_native.Echo()), HIDDEN, SLOTS >= 0) as (address, _):
        run(address, test)


def test_others_run_while_batches_are_computed() -> None:
    """The GIL is not held: Python threads go on, and so does what asks the server for its load."""
    x, pairs = rows(64), some_pairs(64, numpy.random.default_rng(1))
    turns, done = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not done.is_set():
            assert endpoint.load().rows_total >= 0
            turns += 1

    async def test(call: Any) -> None:
        thread = threading.Thread(target=count)
        thread.start()
        for _ in range(200):
            await call.write(request(x, pairs))
            await call.read()
        done.set()
        await asyncio.to_thread(thread.join)
        assert turns > 0 and endpoint.load().rows_total == 200 * 64

    with serving(Native(expertmesh_native.Echo()), HIDDEN, SLOTS >= 0) as (address, endpoint):
        run(address, test)
