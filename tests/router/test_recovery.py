"""Replicas that are late, hang or answer nonsense, over real streams: the right sums all the same, and soon."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mesh import TRANSPORTS, running_directory
from scripted_replica import FINGERPRINT, LAYER, Script, ScriptedReplica, checked, success, weighted

from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.tensors import decode, encode
from router_service.connection import RouterSettings, open_transport
from router_service.dispatch.scatter import ReplicaBatch
from router_service.dispatcher import Dispatcher
from router_service.latency import UNKNOWN_S
from router_service.recovery import ExpertsUnavailable, HedgeBudget, RowsLost
from router_service.replicas import LiveReplica, LiveReplicas
from router_service.transport.pulse import LOOK_S, LOOKS

EXPERTS, WIDTH, WARM = 4, 8, 12
EVERY = set(range(EXPERTS))


@contextlib.contextmanager
def dispatching(
    transport: str,
    *replicas: ScriptedReplica,
    wait_s: float = 20.0,
    timeout_s: float = 30.0,
    checksums: bool = False,
    join: list[Callable[[ScriptedReplica], object]] | None = None,
) -> Iterator[Dispatcher]:
    """`join` gets what makes one more replica join."""
    live = LiveReplicas()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(running_directory())
        for replica in replicas:
            stack.enter_context(replica.running(directory))
        chosen = {"directory": directory, "transport": transport, "dispatch_timeout_s": timeout_s}
        made = RouterSettings.model_validate(chosen | {"checksums": checksums})
        opened = open_transport(made, FINGERPRINT, live)
        stack.callback(opened.close)
        until(lambda: len(live.snapshot()) == len(replicas))
        if join is not None:
            join.append(lambda one: stack.enter_context(one.running(directory)))
        yield Dispatcher(live, opened, wait_s)


def until(condition: object, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def step(seed: int = 0, tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, ids and weights."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, WIDTH, generator=generator)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :2]
    return rows, ids, torch.rand(tokens, 2, generator=generator)


def sums(rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return rows * (weights * (ids + 1)).sum(1, keepdim=True)


def check(made: Dispatcher, seed: int = 0, tokens: int = 5) -> None:
    """One layer; its sums must be right, whoever answered."""
    rows, ids, weights = step(seed, tokens)
    result = made.finish(made.start(LAYER, rows, ids, weights))
    torch.testing.assert_close(result, sums(rows, ids, weights))


class Hanging:
    """Answers until `stopped` is set, then keeps its answers until it is cleared."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.running.set()

    def __call__(self, request: pb.DispatchRequest) -> Iterator[bytes]:
        self.running.wait(30)
        yield success(request).SerializeToString()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_replica_that_hangs_is_not_waited_for_and_comes_back(transport: str) -> None:
    hanging = Hanging()
    with dispatching(transport, ScriptedReplica("a", EVERY, hanging), ScriptedReplica("b", EVERY)) as made:
        for seed in range(WARM):
            check(made, seed)
        hanging.running.clear()
        for seed in range(WARM):
            check(made, seed)
        assert made.counters.hedged == made.counters.hedges_won == 1  # suspended by the first, so no other was late
        assert set(made.replicas.suspended()) == {"a"} or "a" in made.replicas.snapshot()  # Describe still answers
        assert made.replicas.suspensions()["since_start"] == {"g": {"late": 1}}
        hanging.running.set()
        until(lambda: set(made.replicas.snapshot()) == {"a", "b"})
        check(made)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_only_replica_of_an_expert_is_waited_for(transport: str) -> None:
    hanging = Hanging()
    with dispatching(transport, ScriptedReplica("a", {0, 1}, hanging), ScriptedReplica("b", {2, 3})) as made:
        for seed in range(WARM):
            check(made, seed)
        hanging.running.clear()
        threading.Timer(0.5, hanging.running.set).start()
        check(made)
        assert made.counters.hedged == 0 and not made.replicas.suspended()
        assert made.replicas.suspensions() == {"now": {"g": 0}, "since_start": {}}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_who_does_not_answer_at_all_is_suspended_for_it_where_nobody_else_may_be_asked(transport: str) -> None:
    hanging = Hanging()
    with dispatching(transport, ScriptedReplica("a", EVERY, hanging), ScriptedReplica("b", EVERY), timeout_s=1) as made:
        check(made)
        object.__setattr__(made, "_budget", HedgeBudget(share=0.0, _tokens=0.0))
        hanging.running.clear()
        until(lambda: check(made) or made.counters.resent_rows)
        assert made.replicas.suspensions()["since_start"] == {"g": {"timeout": 1}}
        hanging.running.set()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_where_all_are_late_the_first_answer_counts(transport: str) -> None:
    first, last = Hanging(), Hanging()
    with dispatching(transport, ScriptedReplica("a", EVERY, first), ScriptedReplica("b", EVERY, last)) as made:
        for seed in range(WARM):
            check(made, seed)
        first.running.clear()
        last.running.clear()
        threading.Timer(0.6, first.running.set).start()
        check(made)
        assert made.counters.hedged >= 1
        last.running.set()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_who_has_just_come_is_late_as_soon_as_its_peers_would_be(transport: str) -> None:
    join: list[Callable[[ScriptedReplica], object]] = []
    with dispatching(transport, ScriptedReplica("a", EVERY), ScriptedReplica("other", {0}), join=join) as made:
        for seed in range(WARM):
            check(made, seed)
        join[0](ScriptedReplica("alike", EVERY))
        join[0](ScriptedReplica("unlike", {0, 1}))
        until(lambda: {"alike", "unlike"} <= made.replicas.snapshot().keys())

        def late_after_s(replica: str) -> float:
            one = ReplicaBatch(
                replica, np.zeros(1, np.int64), *(np.zeros(1, np.int32),) * 2, pair_weights=np.ones(1, np.float32)
            )
            return made.transport.start(LAYER, torch.ones(1, WIDTH), [one]).late_after_s()

        assert late_after_s("alike") < UNKNOWN_S / 2 < late_after_s("unlike")


def not_a_number(request: pb.DispatchRequest) -> Iterator[bytes]:
    answer = success(request)
    answer.output.CopyFrom(encode(torch.full((request.hidden_states.rows, WIDTH), float("nan"))))
    yield answer.SerializeToString()


def another_type(request: pb.DispatchRequest) -> Iterator[bytes]:
    answer = success(request)
    answer.output.CopyFrom(encode(torch.zeros(request.hidden_states.rows, WIDTH, dtype=torch.float16)))
    yield answer.SerializeToString()


def too_few_rows(request: pb.DispatchRequest) -> Iterator[bytes]:
    answer = success(request)
    answer.output.CopyFrom(encode(torch.zeros(request.hidden_states.rows - 1, WIDTH)))
    yield answer.SerializeToString()


def unknown_code(request: pb.DispatchRequest) -> Iterator[bytes]:
    status = pb.Status(code=pb.Code.ValueType(77))
    yield pb.DispatchResponse(id=request.id, status=status).SerializeToString()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("corrupt", "reason"),
    [(not_a_number, "not_finite"), (another_type, "error"), (too_few_rows, "error"), (unknown_code, "error")],
)
def test_a_corrupt_answer_is_a_failure_and_its_replica_rests(transport: str, corrupt: Script, reason: str) -> None:
    with dispatching(transport, ScriptedReplica("a", EVERY, corrupt), ScriptedReplica("b", EVERY)) as made:
        for seed in range(4):
            check(made, seed)
        assert made.counters.resent_rows > 0
        assert set(made.replicas.suspended()) <= {"a"}  # on a slow machine a probe has ended its rest by now
        assert made.replicas.suspensions()["since_start"]["g"].keys() == {reason}


def other_sign(request: pb.DispatchRequest) -> Iterator[bytes]:
    answer = success(request)
    answer.output.CopyFrom(encode(-weighted(request)))
    yield answer.SerializeToString()


def unchecked(request: pb.DispatchRequest) -> Iterator[bytes]:
    answer = success(request)
    answer.ClearField("checksum")
    yield answer.SerializeToString()


def changed_request(request: pb.DispatchRequest) -> Iterator[bytes]:
    refused = pb.DispatchResponse(id=request.id, status=pb.Status(code=pb.CODE_DATA_LOSS))
    yield checked(refused).SerializeToString()


def invalid_without_checksum(request: pb.DispatchRequest) -> Iterator[bytes]:
    refused = pb.DispatchResponse(id=request.id, status=pb.Status(code=pb.CODE_INVALID_ARGUMENT))
    yield refused.SerializeToString()


def computed_wrongly(request: pb.DispatchRequest) -> Iterator[bytes]:
    (answer,) = not_a_number(request)
    yield checked(pb.DispatchResponse.FromString(answer)).SerializeToString()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("corrupt", "reason"),
    [
        (other_sign, "checksum"),
        (not_a_number, "checksum"),
        (unchecked, "checksum"),
        (changed_request, "checksum"),
        (invalid_without_checksum, "checksum"),
        (computed_wrongly, "not_finite"),
    ],
)
def test_what_a_checksum_tells_is_a_failure_and_the_replica_rests(transport: str, corrupt: Script, reason: str) -> None:
    bad, good = ScriptedReplica("a", EVERY, corrupt), ScriptedReplica("b", EVERY)
    with dispatching(transport, bad, good, checksums=True) as made:
        for seed in range(4):
            check(made, seed)
        assert made.counters.resent_rows > 0
        assert made.replicas.suspensions()["since_start"]["g"].keys() == {reason}
        assert all(one.HasField("checksum") for one in bad.requests + good.requests)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_the_option_no_checksum_is_sent_and_the_wrong_sums_are_used(transport: str) -> None:
    lying = ScriptedReplica("a", EVERY, other_sign)
    with dispatching(transport, lying) as made:
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            check(made)
        assert not any(one.HasField("checksum") for one in lying.requests)
        assert made.counters.resent_rows == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_idle_replica_that_knows_no_checksums_is_not_silent(transport: str) -> None:
    """It answers the question whether it is there without one."""
    with dispatching(transport, *(ScriptedReplica(name, EVERY) for name in "ab"), checksums=True) as made:
        time.sleep(6 * LOOK_S * LOOKS)
        until(lambda: set(made.replicas.snapshot()) == {"a", "b"})


class FlipsOne:
    """Flips a bit of the first answer to a request, and of no later one."""

    def __init__(self) -> None:
        self.bit: int | None = None

    def __call__(self, request: pb.DispatchRequest) -> Iterator[bytes]:
        message, bit, self.bit = bytearray(success(request).SerializeToString()), self.bit, None
        if bit is not None:
            message[bit // 8 % len(message)] ^= 1 << bit % 8
        yield bytes(message)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_bit_of_an_answer_with_a_checksum_changes_a_sum(transport: str) -> None:
    """Nor does a request fail, though nobody else serves its experts."""
    flips = FlipsOne()
    with dispatching(transport, ScriptedReplica("a", EVERY, flips), timeout_s=0.3, checksums=True) as made:

        @given(st.integers(0, 8 * 256 - 1))
        @example(0)
        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
        def flip(bit: int) -> None:
            flips.bit = bit
            check(made, bit, tokens=3)

        flip()
        assert made.counters.resent_rows > 0 and not made.replicas.suspensions()["since_start"]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_that_are_no_numbers_give_sums_that_are_none(transport: str) -> None:
    with dispatching(transport, ScriptedReplica("a", EVERY), ScriptedReplica("b", EVERY)) as made:
        rows = torch.full((3, WIDTH), float("nan"))
        result = made.finish(made.start(LAYER, rows, torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)))
        assert bool(result.isnan().all()) and made.counters.resent_rows == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_only_nonsense_ends_after_the_wait(transport: str) -> None:
    with (
        dispatching(transport, ScriptedReplica("a", EVERY, another_type), wait_s=0.3) as made,
        pytest.raises(ExpertsUnavailable, match=r"no replica served experts .* within 0\.3 s"),
    ):
        check(made)


def overflowing(request: pb.DispatchRequest) -> Iterator[bytes]:
    """As a model would, of rows that begin with a large number."""
    answer = success(request)
    found = decode(answer.output).clone()
    found[decode(request.hidden_states)[:, 0] > 100] = float("inf")
    answer.output.CopyFrom(encode(found))
    yield answer.SerializeToString()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("replicas", [1, 2])
def test_where_the_model_overflows_that_row_alone_is_lost_at_once(transport: str, replicas: int) -> None:
    every = [ScriptedReplica(name, EVERY, overflowing) for name in "ab"[:replicas]]
    with dispatching(transport, *every, wait_s=600) as made:
        rows, ids, weights = step()
        rows[2, 0] = 1000
        with pytest.raises(RowsLost, match=r"two answers say that the sums of 1 rows are no numbers") as lost:
            made.finish(made.start(LAYER, rows, ids, weights))
        assert lost.value.tokens == {2}
        assert bool(lost.value.sums.isfinite().all())
        others = [0, 1, *range(3, len(rows))]
        torch.testing.assert_close(lost.value.sums[others], sums(rows, ids, weights)[others])
        check(made)


def test_hedges_stay_within_their_share() -> None:
    budget = HedgeBudget(share=0.05, burst=2, _tokens=2)
    spent = 0
    for _ in range(1000):
        budget.earn()
        spent += budget.spend()
    assert 50 <= spent <= 53


def test_the_last_replica_of_an_expert_is_never_suspended() -> None:
    live = LiveReplicas()
    live.add(LiveReplica("a", "g", {0: frozenset({0, 1})}, 10))
    live.add(LiveReplica("b", "h", {0: frozenset({1, 2})}, 10))
    assert not live.suspend("a", "late", "") and set(live.snapshot()) == {"a", "b"}
    live.add(LiveReplica("c", "g", {0: frozenset({0, 1})}, 10))
    assert live.suspend("a", "late", "") and set(live.snapshot()) == {"b", "c"}
    assert not live.suspend("c", "late", "")
    live.resume("a")
    assert set(live.snapshot()) == {"a", "b", "c"}


def test_who_rests_gets_rows_again_where_it_is_the_last_one_left() -> None:
    live = LiveReplicas()
    for name in ("a", "b", "c"):
        live.add(LiveReplica(name, "g", {0: frozenset({0})}, 10))
    live.note_silence("a")
    assert live.suspend("b", "late", "")
    live.remove("c")
    assert set(live.snapshot()) == {"b"} and set(live.suspended()) == {"a"}


def test_who_is_silent_gets_rows_at_its_first_answer_and_no_probe_ends_another_rest() -> None:
    live = LiveReplicas()
    for name in ("a", "b", "c"):
        live.add(LiveReplica(name, "g", {0: frozenset({0})}, 10))
    live.note_silence("a")
    assert live.suspend("b", "late", "")
    live.note_silence("c")  # the only one that is left
    assert set(live.snapshot()) == {"c"} and live.suspended()["a"].probe_at == float("inf")
    for name in ("a", "b", "c"):
        live.note_answer(name)
    assert set(live.snapshot()) == {"a", "c"}
    assert live.suspend("a", "late", "")
    assert live.suspended()["a"].pause_s == 1  # silence says nothing against it later


def test_who_is_suspended_again_rests_longer() -> None:
    live = LiveReplicas()
    for name in ("a", "b"):
        live.add(LiveReplica(name, "g", {0: frozenset({0})}, 10))
    pauses = []
    for _ in range(7):
        live.suspend("a", "late", "")
        pauses.append(live.suspended()["a"].pause_s)
        live.resume("a")
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
