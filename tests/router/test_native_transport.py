"""The native transport: the same bits as the Python functions, and what it does when replicas misbehave."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import native_core, needs_gpu
from mesh import running_directory
from scripted_replica import (
    FINGERPRINT,
    LAYER,
    ScriptedReplica,
    StreamBreaks,
    obliging,
    success,
    weighted,
)

from expertmesh.v1 import expert_pb2 as pb
from router_service.dispatch.choice import choose_replicas
from router_service.dispatch.scatter import combine, scatter, split, to_pairs
from router_service.dispatcher import Dispatcher
from router_service.recovery import DispatchRefused
from router_service.replicas import LiveReplicas
from router_service.transport.base import Answer
from router_service.transport.in_process import InProcessTransport

native_core()
from router_service.transport.native_transport import NativeTransport  # noqa: E402 only where there is a native core

EXPERTS, WIDTH = 12, 40
EVERY = set(range(EXPERTS))


@contextlib.contextmanager
def dispatching(*replicas: ScriptedReplica, timeout_s: float = 30.0, wait_s: float = 20.0) -> Iterator[Dispatcher]:
    """A native dispatcher that has all the replicas."""
    live = LiveReplicas()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(running_directory())
        for replica in replicas:
            stack.enter_context(replica.running(directory))
        transport = NativeTransport(directory, FINGERPRINT, live, timeout_s)
        stack.callback(transport.close)
        wait_until(lambda: len(live.snapshot()) == len(replicas))
        yield Dispatcher(live, transport, wait_s)


def wait_until(condition: object, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def routed(
    tokens: int, dtype: torch.dtype, seed: int = 0, top_k: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :top_k]
    ids[torch.rand(tokens, top_k, generator=generator) < 0.1] = -1
    hidden_states = torch.randn(tokens, WIDTH, generator=generator) * 10 ** torch.randn(tokens, 1, generator=generator)
    return hidden_states.to(dtype), ids, torch.rand(tokens, top_k, generator=generator)


def reference(
    replicas: dict[str, set[int]], hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, max_rows: int
) -> torch.Tensor:
    """By the Python functions, with the same choice of replicas as at the start."""
    from router_service.dispatch.choice import Candidate

    pairs = to_pairs(ids, weights)
    owners, _ = choose_replicas(
        pairs.counts(), [Candidate(name, frozenset(experts), 0) for name, experts in replicas.items()]
    )
    parts = []
    for batch in itertools.chain.from_iterable(split(one, max_rows) for one in scatter(pairs, owners)):
        factors = torch.zeros(len(batch.rows))
        pair_factors = torch.from_numpy(batch.pair_weights) * (torch.from_numpy(batch.pair_experts) + 1)
        factors.index_add_(0, torch.from_numpy(batch.pair_rows).long(), pair_factors)
        rows = hidden_states[torch.from_numpy(batch.rows)].float()
        parts.append((batch, (rows * factors[:, None]).to(hidden_states.dtype)))
    parts.sort(key=lambda part: (int(part[0].pair_experts.min()), int(part[0].rows[0])))
    return combine(len(hidden_states), hidden_states.shape[1], hidden_states.dtype, parts)


def run(made: Dispatcher, *rows: torch.Tensor) -> torch.Tensor:
    return made.finish(made.start(LAYER, *rows))


def check(made: Dispatcher, tokens: int = 9, seed: int = 0) -> None:
    """That the result is right, whoever answered."""
    rows = routed(tokens, torch.float32, seed)
    torch.testing.assert_close(run(made, *rows), reference({"a": EVERY}, *rows, max_rows=1000))


def under_way(made: Dispatcher) -> list[int]:
    made.replicas.candidates(LAYER)
    return [one.rows_under_way for one in made.replicas.snapshot().values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_rows", [1000, 5])
def test_the_sums_have_the_bits_of_the_python_functions(dtype: torch.dtype, max_rows: int) -> None:
    held = {"c": {0, 1, 2, 7}, "a": {3, 4, 5}, "b": {6, 8, 9, 10, 11}}
    with dispatching(*(ScriptedReplica(name, experts, max_rows=max_rows) for name, experts in held.items())) as made:
        for seed, tokens in enumerate((0, 1, 2, 17, 300)):
            hidden_states, ids, weights = routed(tokens, dtype, seed)
            expected = reference(held, hidden_states, ids, weights, max_rows)
            for asked in (ids, ids.to(torch.int32)):
                result = run(made, hidden_states, asked, weights)
                assert result.dtype is dtype and torch.equal(result, expected)
            strided = torch.cat([hidden_states, hidden_states], dim=1)[:, :WIDTH]
            assert torch.equal(run(made, strided, ids, weights), expected)


@st.composite
def any_step(draw: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With none or several of a token's experts absent, and the same one more than once."""
    tokens, top_k = draw(st.integers(0, 12)), draw(st.integers(1, 5))
    pairs = tokens * top_k
    ids = draw(st.lists(st.integers(-1, EXPERTS - 1), min_size=pairs, max_size=pairs))
    weights = draw(st.lists(st.floats(-2, 2, width=32), min_size=pairs, max_size=pairs))
    hidden_states = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return (
        hidden_states,
        torch.tensor(ids, dtype=torch.int64).view(tokens, top_k),
        torch.tensor(weights, dtype=torch.float32).view(tokens, top_k),
    )


@pytest.mark.parametrize("max_rows", [1000, 3])
def test_any_step_has_the_bits_of_the_python_functions(max_rows: int) -> None:
    held = {"c": {0, 1, 2, 7}, "a": {3, 4, 5}, "b": {6, 8, 9, 10, 11}}
    with dispatching(*(ScriptedReplica(name, experts, max_rows=max_rows) for name, experts in held.items())) as made:

        @settings(max_examples=100, deadline=None)
        @given(any_step())
        def compare(step: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            assert torch.equal(run(made, *step), reference(held, *step, max_rows=max_rows))

        compare()


def test_no_request_is_larger_than_its_replica_takes_and_each_row_is_sent_once() -> None:
    replica = ScriptedReplica("a", EVERY, max_rows=4)
    with dispatching(replica) as made:
        check(made, tokens=30)
    assert max(request.hidden_states.rows for request in replica.requests) <= 4
    assert sum(request.hidden_states.rows for request in replica.requests) == 30
    assert len({request.id for request in replica.requests}) == len(replica.requests)


def test_rows_that_answers_carry_over_many_frames_are_added_right() -> None:
    with dispatching(ScriptedReplica("a", {0, 2, 4, 6, 8, 10}), ScriptedReplica("b", {1, 3, 5, 7, 9, 11})) as made:
        generator = torch.Generator().manual_seed(1)
        hidden_states = torch.randn(700, 1001, generator=generator).bfloat16()
        ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(700)])
        weights = torch.rand(700, 2, generator=generator)
        held = {"a": {0, 2, 4, 6, 8, 10}, "b": {1, 3, 5, 7, 9, 11}}
        assert torch.equal(run(made, hidden_states, ids, weights), reference(held, hidden_states, ids, weights, 1000))


def test_loads_are_counted_and_come_back_to_nothing() -> None:
    with dispatching(ScriptedReplica("a", EVERY)) as made:
        rows = routed(9, torch.float32)
        sent = int((rows[1] >= 0).any(1).sum())
        step = made.start(LAYER, *rows)
        assert under_way(made) == [sent]
        made.finish(step)
        assert under_way(made) == [0]
        assert made.replicas.candidates(LAYER)[0].sent == sent
        dropped = made.start(LAYER, *rows)
        del dropped
        assert under_way(made) == [0]
        check(made)


def test_timings_name_the_parts_of_a_layer() -> None:
    with dispatching(ScriptedReplica("a", EVERY)) as made:
        for _ in range(3):
            check(made)
        assert isinstance(made.transport, NativeTransport)
        timings = made.transport.timings()[LAYER]
        assert (timings.steps, timings.messages) == (3, 3)
        assert (timings.queue_us, timings.compute_us) == (3 * 7, 3 * 11)
        assert timings.round_trip_us > 0 and timings.scatter_us > 0


def failing(code: pb.Code.ValueType) -> ScriptedReplica:
    def refuse(request: pb.DispatchRequest) -> Iterator[bytes]:
        yield pb.DispatchResponse(id=request.id, status=pb.Status(code=code, message="née")).SerializeToString()

    return ScriptedReplica("bad", EVERY, refuse)


def broken(request: pb.DispatchRequest) -> Iterator[bytes]:
    raise StreamBreaks
    yield b""


def garbage(request: pb.DispatchRequest) -> Iterator[bytes]:
    yield b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"


def truncated(request: pb.DispatchRequest) -> Iterator[bytes]:
    yield success(request).SerializeToString()[:-3]


def too_short(request: pb.DispatchRequest) -> Iterator[bytes]:
    response = success(request)
    response.output.data = response.output.data[:-1]
    yield response.SerializeToString()


def too_narrow(request: pb.DispatchRequest) -> Iterator[bytes]:
    response = success(request)
    response.output.width, response.output.rows = response.output.rows, response.output.width
    yield response.SerializeToString()


def overflowing(request: pb.DispatchRequest) -> Iterator[bytes]:
    response = success(request)
    response.output.rows = response.output.width = 2**32 - 1
    yield response.SerializeToString()


def other_type(request: pb.DispatchRequest) -> Iterator[bytes]:
    response = success(request)
    response.output.dtype = pb.DTYPE_INT32
    yield response.SerializeToString()


def silent(request: pb.DispatchRequest) -> Iterator[bytes]:
    yield from ()


@pytest.mark.parametrize("script", [broken, garbage, truncated, too_short, too_narrow, overflowing, other_type, silent])
def test_what_one_replica_spoils_another_computes(script: object) -> None:
    bad = ScriptedReplica("bad", EVERY, script)  # type: ignore[arg-type]
    with dispatching(bad, ScriptedReplica("good", EVERY), timeout_s=1.0) as made:
        for seed in range(4):
            check(made, seed=seed)
        assert bad.requests
        assert under_way(made) == [0] * len(under_way(made))


@pytest.mark.parametrize("code", [pb.CODE_UNAVAILABLE, pb.CODE_RESOURCE_EXHAUSTED, pb.CODE_INTERNAL])
def test_what_one_replica_refuses_another_computes(code: pb.Code.ValueType) -> None:
    with dispatching(failing(code), ScriptedReplica("good", EVERY)) as made:
        for seed in range(4):
            check(made, seed=seed)


def test_what_is_invalid_is_not_sent_again() -> None:
    with dispatching(failing(pb.CODE_INVALID_ARGUMENT)) as made, pytest.raises(DispatchRefused, match="née"):
        check(made)


def test_an_answer_that_comes_late_or_twice_or_to_nobody_is_ignored() -> None:
    late: list[bytes] = []

    def confused(request: pb.DispatchRequest) -> Iterator[bytes]:
        answer = success(request)
        if len(late) < 1:
            late.append(answer.SerializeToString())
            return
        yield from late
        yield pb.DispatchResponse(id=10**12, status=pb.Status(code=pb.CODE_OK)).SerializeToString()
        yield answer.SerializeToString()
        yield answer.SerializeToString()

    with dispatching(ScriptedReplica("a", EVERY, confused), timeout_s=0.3) as made:
        for seed in range(4):
            check(made, seed=seed)
        assert under_way(made) == [0]


def test_a_retry_gives_the_same_bits() -> None:
    held = {"a": {0, 1, 2, 3, 4, 5}, "b": {6, 7, 8, 9, 10, 11}}
    once = threading.Event()

    def at_first_busy(request: pb.DispatchRequest) -> Iterator[bytes]:
        if not once.is_set():
            once.set()
            yield pb.DispatchResponse(
                id=request.id, status=pb.Status(code=pb.CODE_RESOURCE_EXHAUSTED)
            ).SerializeToString()
        else:
            yield from obliging(request)

    rows = routed(40, torch.bfloat16)
    with dispatching(ScriptedReplica("a", held["a"], at_first_busy), ScriptedReplica("b", held["b"])) as made:
        assert torch.equal(run(made, *rows), reference(held, *rows, max_rows=1000))
    assert once.is_set()


def test_an_expert_that_comes_later_is_waited_for() -> None:
    live = LiveReplicas()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(running_directory())
        stack.enter_context(ScriptedReplica("a", EVERY - {3}).running(directory))
        transport = NativeTransport(directory, FINGERPRINT, live)
        stack.callback(transport.close)
        made = Dispatcher(live, transport)
        results: list[BaseException | None] = []

        def step() -> None:
            check(made, tokens=20)
            results.append(None)

        waiting = threading.Thread(target=step)
        waiting.start()
        wait_until(lambda: len(live.snapshot()) == 1)
        stack.enter_context(ScriptedReplica("b", {3}).running(directory))
        waiting.join(20)
        assert results == [None]


def test_threads_may_step_at_once() -> None:
    def slowly(request: pb.DispatchRequest) -> Iterator[bytes]:
        time.sleep(0.0005 * (request.id % 5))
        yield from obliging(request)

    with dispatching(ScriptedReplica("a", {0, 1, 2, 3, 4, 5}, slowly), ScriptedReplica("b", EVERY, slowly)) as made:
        failures: list[AssertionError] = []

        def steps(first: int) -> None:
            try:
                for seed in range(first, first + 25):
                    check(made, tokens=1 + seed % 7, seed=seed)
            except AssertionError as error:
                failures.append(error)

        threads = [threading.Thread(target=steps, args=(100 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures and not any(thread.is_alive() for thread in threads)
        assert under_way(made) == [0, 0]


def test_a_stream_that_breaks_between_steps_is_noticed_and_opened_again() -> None:
    def breaking(request: pb.DispatchRequest) -> Iterator[bytes]:
        yield from obliging(request)
        raise StreamBreaks

    with dispatching(ScriptedReplica("a", EVERY, breaking)) as made:
        first = made.replicas.snapshot()["a"]
        check(made)
        wait_until(lambda: made.replicas.snapshot().get("a", first) is not first)
        check(made, seed=1)


def test_closing_ends_a_step_that_waits() -> None:
    asked = threading.Event()

    def silent_once_asked(request: pb.DispatchRequest) -> Iterator[bytes]:
        asked.set()
        yield from ()

    with dispatching(ScriptedReplica("a", EVERY, silent_once_asked)) as made:
        step = made.start(LAYER, *routed(4, torch.float32))
        gathered: list[object] = []
        waiting = threading.Thread(target=lambda: gathered.append(step.gather()))  # type: ignore[union-attr]
        waiting.start()
        assert asked.wait(20)
        made.transport.close()  # type: ignore[attr-defined]
        waiting.join(20)
        assert gathered == [None]
        _, pending, _ = step.parts()  # type: ignore[union-attr]
        assert [answer.code for answer in pending.wait(0) if answer] == [pb.CODE_UNAVAILABLE]


@needs_gpu
def test_rows_on_a_gpu_come_back_there() -> None:
    with dispatching(ScriptedReplica("a", EVERY)) as made:
        rows = routed(17, torch.bfloat16)
        result = run(made, *(tensor.cuda() for tensor in rows))
        assert result.is_cuda and torch.equal(result.cpu(), run(made, *rows))


def test_the_reference_is_what_the_python_dispatcher_gives() -> None:
    """So that comparing with the reference compares with it."""
    from router_service.dispatch.scatter import ReplicaBatch
    from router_service.replicas import LiveReplica

    def compute(layer: int, rows: torch.Tensor, batch: ReplicaBatch) -> Answer:
        from expertmesh.wire.tensors import WIRE_DTYPES, encode

        columns = [torch.from_numpy(np.ascontiguousarray(one)) for one in (batch.pair_rows, batch.pair_experts)]
        request = pb.DispatchRequest(
            hidden_states=encode(rows),
            pair_rows=encode(columns[0]),
            pair_experts=encode(columns[1]),
            pair_weights=encode(torch.from_numpy(np.ascontiguousarray(batch.pair_weights))),
            output_dtype=WIRE_DTYPES[rows.dtype],
        )
        return Answer(pb.CODE_OK, output=weighted(request))

    held = {"a": {0, 1, 2, 3, 4, 5}, "b": {6, 7, 8, 9, 10, 11}}
    live = LiveReplicas()
    for name, experts in held.items():
        live.add(LiveReplica(name, "g", {LAYER: frozenset(experts)}, 5))
    made = Dispatcher(live, InProcessTransport(dict.fromkeys(held, compute)))
    rows = routed(23, torch.bfloat16)
    assert torch.equal(run(made, *rows), reference(held, *rows, max_rows=5))
