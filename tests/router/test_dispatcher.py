"""The dispatcher over the in-process transport: what it does when replicas fail."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from expertmesh.v1 import expert_pb2 as pb
from router_service.dispatch.scatter import ReplicaBatch
from router_service.dispatcher import Dispatcher
from router_service.recovery import DispatchRefused, ExpertsLeftOut, ExpertsUnavailable
from router_service.replicas import LiveReplica, LiveReplicas
from router_service.transport.base import Answer
from router_service.transport.in_process import InProcessTransport, Replica

IDS = torch.tensor([[0, 1], [1, 2], [3, 0]])
WEIGHTS = torch.tensor([[0.5, 0.25], [1.0, 2.0], [0.1, 0.2]])
HIDDEN_STATES = torch.arange(12, dtype=torch.float32).view(3, 4)
EXPECTED = HIDDEN_STATES * (WEIGHTS * (IDS + 1)).sum(1, keepdim=True)


def scaling(layer: int, rows: torch.Tensor, batch: ReplicaBatch) -> Answer:
    """Expert e multiplies by e + 1."""
    factors = torch.zeros(len(rows))
    pair_factors = torch.from_numpy(batch.pair_weights) * (torch.from_numpy(batch.pair_experts) + 1)
    factors.index_add_(0, torch.from_numpy(batch.pair_rows).long(), pair_factors)
    return Answer(pb.CODE_OK, output=rows * factors[:, None])


def failing(code: pb.Code.ValueType, times: int = 10**6) -> Replica:
    """Answers with `code` the first `times`, then computes."""
    left = [times]

    def answer(layer: int, rows: torch.Tensor, batch: ReplicaBatch) -> Answer:
        left[0] -= 1
        return Answer(code, "on purpose") if left[0] >= 0 else scaling(layer, rows, batch)

    return answer


def dispatcher(
    replicas: dict[str, tuple[set[int], Replica]],
    wait_s: float = 5.0,
    max_rows: int = 100,
    degrade_after_s: float | None = None,
) -> Dispatcher:
    live = LiveReplicas()
    for name, (experts, _) in replicas.items():
        live.add(LiveReplica(name, "g", {0: frozenset(experts)}, max_rows))
    transport = InProcessTransport({name: made for name, (_, made) in replicas.items()})
    return Dispatcher(live, transport, wait_s, degrade_after_s)


def run(made: Dispatcher) -> torch.Tensor:
    return made.finish(made.start(0, HIDDEN_STATES, IDS, WEIGHTS))


@pytest.mark.parametrize("max_rows", [100, 1])
def test_several_replicas_give_the_dense_result(max_rows: int) -> None:
    made = dispatcher({"a": ({0, 1}, scaling), "b": ({2, 3}, scaling)}, max_rows=max_rows)
    torch.testing.assert_close(run(made), EXPECTED)


@pytest.mark.parametrize(
    "code", [pb.CODE_UNAVAILABLE, pb.CODE_RESOURCE_EXHAUSTED, pb.CODE_INTERNAL, pb.CODE_DEADLINE_EXCEEDED]
)
def test_what_one_fails_another_answers(code: pb.Code.ValueType) -> None:
    every = {0, 1, 2, 3}
    torch.testing.assert_close(run(dispatcher({"a": (every, failing(code)), "b": (every, scaling)})), EXPECTED)


def test_the_only_replica_is_asked_again() -> None:
    made = dispatcher({"a": ({0, 1, 2, 3}, failing(pb.CODE_RESOURCE_EXHAUSTED, times=3))})
    torch.testing.assert_close(run(made), EXPECTED)


def test_a_missing_expert_is_waited_for() -> None:
    transport_replicas: dict[str, Callable[..., Answer]] = {"a": scaling, "b": scaling}
    live = LiveReplicas()
    live.add(LiveReplica("a", "g", {0: frozenset({0, 1})}, 100))
    made = Dispatcher(live, InProcessTransport(transport_replicas), wait_s=30)
    later = threading.Timer(0.2, live.add, [LiveReplica("b", "g", {0: frozenset({2, 3})}, 100)])
    later.start()
    torch.testing.assert_close(run(made), EXPECTED)


def test_the_wait_is_bounded_and_names_the_experts() -> None:
    with pytest.raises(ExpertsUnavailable, match=r"layer 0: no replica served experts 2-3 within 0\.2 s"):
        run(dispatcher({"a": ({0, 1}, scaling)}, wait_s=0.2))


def test_what_is_invalid_is_not_sent_again() -> None:
    with pytest.raises(DispatchRefused, match="on purpose"):
        run(dispatcher({"a": ({0, 1, 2, 3}, failing(pb.CODE_INVALID_ARGUMENT))}))


def test_one_that_comes_back_in_time_degrades_nothing() -> None:
    live = LiveReplicas()
    live.add(LiveReplica("a", "g", {0: frozenset({0, 1})}, 100))
    made = Dispatcher(live, InProcessTransport({"a": scaling, "b": scaling}), 60, 30)
    threading.Timer(0.2, live.add, [LiveReplica("b", "g", {0: frozenset({2, 3})}, 100)]).start()
    torch.testing.assert_close(run(made), EXPECTED)
    assert made.counters.degraded_rows == 0


def test_degraded_until_it_is_back_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    made = dispatcher({"a": ({0, 1}, scaling), "b": ({3}, scaling), "c": ({2}, scaling)}, 60, degrade_after_s=0.05)
    made.replicas.remove("c")
    for _ in range(3):
        with pytest.raises(ExpertsLeftOut) as caught:
            run(made)
        assert (caught.value.tokens, caught.value.degraded) == (set(), {1})
        expected = EXPECTED.clone()
        expected[1] = HIDDEN_STATES[1] * 3.0 * 2  # all of the gate's weights, 1 + 2, on expert 1
        torch.testing.assert_close(caught.value.sums, expected)
    made.replicas.add(LiveReplica("c", "g", {0: frozenset({2})}, 100))
    torch.testing.assert_close(run(made), EXPECTED)
    said = [record.message for record in caplog.records if "degraded" in record.message]
    assert said == [
        "degraded: layer 0 goes on without experts 2; answers concerned are marked",
        "no longer degraded: all experts that were left out are served again",
    ]


def test_a_token_without_any_expert_is_lost() -> None:
    with pytest.raises(ExpertsUnavailable, match="nobody serves any expert of 1 rows") as caught:
        run(dispatcher({"a": ({0, 3}, scaling)}, 60, degrade_after_s=0.05))
    assert (caught.value.tokens, caught.value.degraded) == ({1}, {0})
