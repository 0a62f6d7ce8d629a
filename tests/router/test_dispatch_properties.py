"""Dispatch and combine equal the dense computation, whatever the gate chooses and however the experts are divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.v1 import expert_pb2 as pb
from router_service.dispatch.scatter import ReplicaBatch
from router_service.dispatcher import Dispatcher, ExpertsUnavailable
from router_service.recovery import RowsLost
from router_service.replicas import LiveReplica, LiveReplicas
from router_service.transport.base import Answer
from router_service.transport.in_process import InProcessTransport

WIDTH = 3


def scaling(layer: int, rows: torch.Tensor, batch: ReplicaBatch) -> Answer:
    """Expert e multiplies by e + 1."""
    factors = torch.zeros(len(rows))
    pair_factors = torch.from_numpy(batch.pair_weights) * (torch.from_numpy(batch.pair_experts) + 1)
    factors.index_add_(0, torch.from_numpy(batch.pair_rows).long(), pair_factors)
    return Answer(pb.CODE_OK, output=rows * factors[:, None])


class Flaky:
    """Fails the calls that `fails` says."""

    def __init__(self, fails: list[bool]) -> None:
        self._fails = iter(fails)

    def __call__(self, layer: int, rows: torch.Tensor, batch: ReplicaBatch) -> Answer:
        if next(self._fails, False):
            return Answer(pb.CODE_RESOURCE_EXHAUSTED, "on purpose")
        return scaling(layer, rows, batch)


@st.composite
def steps(draw: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[set[int]], int]:
    """Rows, ids (with absent ones and the same expert twice for a token), weights, held experts and max_rows."""
    experts, tokens, top_k = draw(st.integers(1, 9)), draw(st.integers(0, 12)), draw(st.integers(1, 4))
    shape = tokens * top_k
    ids = draw(st.lists(st.integers(-1, experts - 1), min_size=shape, max_size=shape))
    weights = draw(st.lists(st.floats(-2, 2, width=16), min_size=shape, max_size=shape))
    rows = draw(st.lists(st.integers(-8, 8), min_size=tokens * WIDTH, max_size=tokens * WIDTH))
    held = draw(st.lists(st.sets(st.integers(0, experts - 1)), min_size=1, max_size=5))
    held[0] |= set(range(experts)) - set().union(*held)
    return (
        torch.tensor(rows, dtype=torch.float32).view(tokens, WIDTH),
        torch.tensor(ids, dtype=torch.int64).view(tokens, top_k),
        torch.tensor(weights, dtype=torch.float32).view(tokens, top_k),
        held,
        draw(st.integers(1, 6)),
    )


def dense(rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return rows * (weights * (ids + 1).clamp(min=0)).sum(1, keepdim=True)


def dispatcher(
    held: list[set[int]], max_rows: int, replicas: dict[str, Any], degrade_after_s: float | None = None
) -> Dispatcher:
    live = LiveReplicas()
    for number, experts in enumerate(held):
        live.add(LiveReplica(f"r{number}", "g", {0: frozenset(experts)}, max_rows))
    return Dispatcher(live, InProcessTransport(replicas), 0.05, degrade_after_s)


@settings(max_examples=150, deadline=None)
@given(steps())
def test_any_choice_over_any_division_is_the_dense_result(step: Any) -> None:
    rows, ids, weights, held, max_rows = step
    made = dispatcher(held, max_rows, {f"r{number}": scaling for number in range(len(held))})
    result = made.finish(made.start(0, rows, ids, weights))
    torch.testing.assert_close(result, dense(rows, ids, weights), rtol=1e-4, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(steps(), st.lists(st.booleans(), max_size=4))
def test_failures_on_the_way_change_nothing(step: Any, fails: list[bool]) -> None:
    rows, ids, weights, held, max_rows = step
    held = [*held, set().union(*held)]
    replicas = {f"r{number}": Flaky(fails) if number % 2 else scaling for number in range(len(held))}
    made = dispatcher(held, max_rows, replicas)
    result = made.finish(made.start(0, rows, ids, weights))
    torch.testing.assert_close(result, dense(rows, ids, weights), rtol=1e-4, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(steps(), st.integers(0, 8))
def test_without_an_expert_only_its_tokens_are_lost(step: Any, missing: int) -> None:
    rows, ids, weights, held, max_rows = step
    held = [experts - {missing} for experts in held]
    made = dispatcher(held, max_rows, {f"r{number}": scaling for number in range(len(held))})
    concerned = {token for token in range(len(ids)) if bool((ids[token] == missing).any())}
    dispatch = made.start(0, rows, ids, weights)
    if not concerned:
        made.finish(dispatch)
        return
    with pytest.raises(ExpertsUnavailable) as caught:
        made.finish(dispatch)
    assert caught.value.tokens == concerned
    spared = [token for token in range(len(ids)) if token not in concerned]
    expected = dense(rows, ids, weights)[spared]
    torch.testing.assert_close(caught.value.sums[spared], expected, rtol=1e-4, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(steps(), st.sets(st.integers(0, 8), max_size=4))
def test_left_out_experts_are_as_if_the_gate_had_chosen_the_others_alone(step: Any, missing: set[int]) -> None:
    rows, ids, weights, held, max_rows = step
    weights = weights.abs() + 0.125
    made = dispatcher(
        [experts - missing for experts in held], max_rows, {f"r{n}": scaling for n in range(len(held))}, 0.001
    )
    chosen = ids >= 0
    gone = chosen & torch.isin(ids, torch.tensor(sorted(missing), dtype=ids.dtype))
    surviving = torch.where(gone, 0.0, weights)
    lost = {token for token in range(len(ids)) if bool(gone[token].any()) and not bool((chosen & ~gone)[token].any())}
    degraded = {token for token in range(len(ids)) if bool(gone[token].any())} - lost
    for _ in range(2):  # while it waits for the experts, and once they are known to be missing
        dispatch, found = made.start(0, rows, ids, weights), (frozenset[int](), frozenset[int]())
        try:
            sums = made.finish(dispatch)
        except RowsLost as error:
            sums, found = error.sums, (error.tokens, error.degraded)
        assert found == (lost, degraded)
        sound = [token for token in range(len(ids)) if token not in lost]
        scale = (weights * chosen).sum(1, keepdim=True) / (surviving * chosen).sum(1, keepdim=True)
        expected = dense(rows, ids, surviving) * torch.where(gone.any(1, keepdim=True), scale, 1.0)
        torch.testing.assert_close(sums[sound], expected[sound], rtol=1e-4, atol=1e-3)
