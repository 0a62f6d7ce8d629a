"""Scatter and combine against the dense computation."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router_service.dispatch.scatter import ReplicaBatch, combine, scatter, split, to_pairs

HIDDEN = 5


@st.composite
def routed(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(topk_ids [T, K], topk_weights [T, K], experts): any ids, -1 and duplicates among them."""
    tokens, width, experts = draw(st.integers(0, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    numbers = st.lists(st.integers(-1, experts - 1), min_size=tokens * width, max_size=tokens * width)
    ids = torch.tensor(draw(numbers), dtype=torch.int32).view(tokens, width)
    weights = torch.randn(tokens, width, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return ids, weights, experts


def partial_sums(batch: ReplicaBatch, hidden_states: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """What a replica answers: each expert is a linear map."""
    rows = hidden_states[torch.from_numpy(batch.rows)]
    output = torch.zeros_like(rows)
    for row, expert, weight in zip(batch.pair_rows, batch.pair_experts, batch.pair_weights, strict=True):
        output[row] += float(weight) * (matrices[expert] @ rows[row])
    return output


@settings(max_examples=150, deadline=None)
@given(routed(), st.integers(1, 4), st.integers(1, 5))
def test_scatter_compute_combine_equals_dense(
    case: tuple[torch.Tensor, torch.Tensor, int], replicas: int, max_rows: int
) -> None:
    ids, weights, experts = case
    generator = torch.Generator().manual_seed(7)
    hidden_states = torch.randn(len(ids), HIDDEN, generator=generator)
    matrices = torch.randn(experts, HIDDEN, HIDDEN, generator=generator)
    dense = torch.zeros(len(ids), HIDDEN)
    for token, column in zip(*np.nonzero(ids.numpy() >= 0), strict=True):
        dense[token] += weights[token, column] * (matrices[ids[token, column]] @ hidden_states[token])

    owners = {expert: f"r{expert % replicas}" for expert in range(experts)}
    batches = [part for batch in scatter(to_pairs(ids, weights), owners) for part in split(batch, max_rows)]
    parts = [(batch, partial_sums(batch, hidden_states, matrices)) for batch in batches]
    combined = combine(len(ids), HIDDEN, torch.float32, parts)

    torch.testing.assert_close(combined, dense, atol=1e-4, rtol=1e-4)
    assert all(len(batch.rows) <= max_rows for batch in batches)
    assert sum(len(batch.pair_rows) for batch in batches) == int((ids >= 0).sum())
    for batch in batches:
        assert len(set(batch.rows)) == len(batch.rows), "a token's row is sent once per message"
        assert {owners[int(expert)] for expert in batch.pair_experts} == {batch.replica}


def test_one_message_per_replica() -> None:
    ids, weights = torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.ones(3, 2)
    batches = scatter(to_pairs(ids, weights), {0: "a", 1: "a", 2: "b", 3: "b"})
    assert [(batch.replica, list(batch.rows)) for batch in batches] == [("a", [0, 2]), ("b", [1, 2])]


def test_the_order_of_batches_follows_the_experts_not_the_names() -> None:
    ids, weights = torch.tensor([[0, 5]]), torch.ones(1, 2)
    pairs = to_pairs(ids, weights)
    assert [batch.replica for batch in scatter(pairs, {0: "z", 5: "a"})] == ["z", "a"]
    assert [batch.replica for batch in scatter(pairs, {0: "a", 5: "z"})] == ["a", "z"]


def test_no_tokens_no_messages() -> None:
    pairs = to_pairs(torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2))
    assert scatter(pairs, {}) == []
    assert combine(0, HIDDEN, torch.bfloat16, []).shape == (0, HIDDEN)
