"""The Python transport against replicas that misbehave, and the event loop that its callers run."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from mesh import running_directory
from scripted_replica import FINGERPRINT, LAYER, Script, ScriptedReplica, StreamBreaks, obliging, success

from expertmesh.v1 import expert_pb2 as pb
from router_service.dispatch.scatter import scatter, to_pairs
from router_service.dispatcher import Dispatcher
from router_service.replicas import LiveReplicas
from router_service.transport.grpc_transport import GrpcTransport
from router_service.transport.shared_loop import IDLE_S, SharedLoop

EVERY = {0, 1, 2, 3}


@contextlib.contextmanager
def dispatching(*replicas: ScriptedReplica, timeout_s: float = 30.0) -> Iterator[Dispatcher]:
    live = LiveReplicas()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(running_directory())
        for replica in replicas:
            stack.enter_context(replica.running(directory))
        transport = GrpcTransport(directory, FINGERPRINT, live, timeout_s)
        stack.callback(transport.close)
        until(lambda: len(live.snapshot()) == len(replicas))
        yield Dispatcher(live, transport, 20.0)


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def check(made: Dispatcher, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(5)])
    weights, rows = torch.rand(5, 2, generator=generator), torch.randn(5, 8, generator=generator)
    result = made.finish(made.start(LAYER, rows, ids, weights))
    torch.testing.assert_close(result, rows * (weights * (ids + 1)).sum(1, keepdim=True))


def broken(request: pb.DispatchRequest) -> Iterator[bytes]:
    raise StreamBreaks
    yield b""


def garbage(request: pb.DispatchRequest) -> Iterator[bytes]:
    yield b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"


def too_short(request: pb.DispatchRequest) -> Iterator[bytes]:
    response = success(request)
    response.output.data = response.output.data[:-1]
    yield response.SerializeToString()


def too_narrow(request: pb.DispatchRequest) -> Iterator[bytes]:
    response = success(request)
    response.output.width, response.output.rows = response.output.rows, response.output.width
    yield response.SerializeToString()


def other_type(request: pb.DispatchRequest) -> Iterator[bytes]:
    response = success(request)
    response.output.dtype = pb.DTYPE_INT32
    yield response.SerializeToString()


def silent(request: pb.DispatchRequest) -> Iterator[bytes]:
    yield from ()


@pytest.mark.parametrize("script", [broken, garbage, too_short, too_narrow, other_type, silent])
def test_what_one_replica_spoils_another_computes(script: Script) -> None:
    bad = ScriptedReplica("bad", EVERY, script)
    with dispatching(bad, ScriptedReplica("good", EVERY), timeout_s=1.0) as made:
        for seed in range(4):
            check(made, seed)
        assert bad.requests
        assert all(one.rows_under_way == 0 for one in made.replicas.snapshot().values())


def test_a_late_answer_is_ignored() -> None:
    late: list[bytes] = []

    def at_first_late(request: pb.DispatchRequest) -> Iterator[bytes]:
        answer = success(request).SerializeToString()
        if not late:
            late.append(answer)
            return
        yield from late
        yield answer

    with dispatching(ScriptedReplica("a", EVERY, at_first_late), timeout_s=0.3) as made:
        for seed in range(3):
            check(made, seed)
        assert [one.rows_under_way for one in made.replicas.snapshot().values()] == [0]


def test_threads_may_step_at_once_and_beside_a_running_event_loop() -> None:
    def slowly(request: pb.DispatchRequest) -> Iterator[bytes]:
        time.sleep(0.0005 * (request.id % 5))
        yield from obliging(request)

    with dispatching(ScriptedReplica("a", {0, 1}, slowly), ScriptedReplica("b", EVERY, slowly)) as made:
        finished: list[int] = []

        def steps(first: int) -> None:
            for seed in range(first, first + 25):
                check(made, seed)
            finished.append(first)

        async def on_a_loop() -> None:
            steps(0)

        threads = [threading.Thread(target=steps, args=(100 * number,)) for number in range(1, 4)]
        for thread in threads:
            thread.start()
        asyncio.run(on_a_loop())
        for thread in threads:
            thread.join(60)
        assert sorted(finished) == [0, 100, 200, 300]


def test_closing_ends_a_step_that_waits() -> None:
    asked = threading.Event()

    def silent_once_asked(request: pb.DispatchRequest) -> Iterator[bytes]:
        asked.set()
        yield from ()

    with dispatching(ScriptedReplica("a", EVERY, silent_once_asked)) as made:
        batches = scatter(to_pairs(torch.tensor([[0]]), torch.ones(1, 1)), {0: "a"})
        step = made.transport.start(LAYER, torch.ones(1, 8), batches)
        codes: list[int] = []
        waiting = threading.Thread(target=lambda: codes.extend(answer.code for answer in step.wait(60) if answer))
        waiting.start()
        assert asked.wait(20)
        assert isinstance(made.transport, GrpcTransport)
        made.transport.close()
        waiting.join(20)
        assert codes == [pb.CODE_UNAVAILABLE]


def test_nothing_to_send_is_answered_with_nothing() -> None:
    with dispatching(ScriptedReplica("a", EVERY)) as made:
        assert made.transport.start(LAYER, torch.ones(1, 8), []).wait(60) == []


def test_a_loop_that_is_borrowed_runs_in_the_borrower_s_thread_and_returns_to_its_own() -> None:
    shared = SharedLoop("test-loop")
    ran_in: list[str] = []

    async def note() -> None:
        ran_in.append(threading.current_thread().name)

    try:
        shared.run(note(), 20)
        with shared.borrow() as ours:
            assert ours
            shared.loop.create_task(note())
            shared.run_once()
            with shared.borrow() as again:
                assert not again
        time.sleep(2 * IDLE_S)
        shared.run(note(), 20)
    finally:
        shared.close()
    assert ran_in == ["test-loop", threading.current_thread().name, "test-loop"]
