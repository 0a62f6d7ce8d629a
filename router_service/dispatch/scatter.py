"""Scatter and combine. T tokens, K experts per token, P (token, expert) pairs, R rows sent to one replica, H hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Pairs:
    """The (token, expert) pairs of one layer of one step, as parallel arrays in token order."""

    tokens: Int64
    """[P]"""
    experts: Int32
    """[P], index within the layer."""
    weights: Float32
    """[P], the gate's."""

    def counts(self) -> dict[int, int]:
        """Rows per expert, experts with none left out."""
        numbers = np.bincount(self.experts)
        return {int(expert): int(numbers[expert]) for expert in np.flatnonzero(numbers)}

    def of(self, experts: frozenset[int]) -> Pairs:
        """Those of the given experts."""
        chosen = np.isin(self.experts, np.fromiter(experts, dtype=np.int32))
        return Pairs(self.tokens[chosen], self.experts[chosen], self.weights[chosen])


@dataclass(frozen=True, slots=True)
class ReplicaBatch:
    """What one replica gets of one layer: each token's row once, and the pairs that name it."""

    replica: str
    rows: Int64
    """[R], token of each row sent, ascending."""
    pair_rows: Int32
    """[P], row within the batch."""
    pair_experts: Int32
    """[P]"""
    pair_weights: Float32
    """[P]"""

    @property
    def pairs(self) -> Pairs:
        return Pairs(self.rows[self.pair_rows], self.pair_experts, self.pair_weights)


def to_pairs(topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> Pairs:
    """[T, K] ids and weights to pairs; an id below 0 means no expert and is left out."""
    ids = topk_ids.detach().cpu().numpy()
    weights = topk_weights.detach().to(device="cpu", dtype=torch.float32).numpy()
    tokens, columns = np.nonzero(ids >= 0)
    return Pairs(tokens, ids[tokens, columns].astype(np.int32), weights[tokens, columns])


def scatter(pairs: Pairs, owners: Mapping[int, str]) -> list[ReplicaBatch]:
    """Groups the pairs by the replica that `owners` (expert -> replica) names.

    The batches are ordered by the smallest expert in each, so that `combine` adds in an order that depends on the
    experts alone. Raises KeyError where an expert has no owner.
    """
    replicas = list(dict.fromkeys(owners[expert] for expert in pairs.counts()))
    if len(replicas) == 1:
        return [_batch(replicas[0], pairs)]
    slots = np.full(int(pairs.experts.max(initial=-1)) + 1, -1, dtype=np.int32)
    for expert, replica in owners.items():
        if expert < len(slots):
            slots[expert] = replicas.index(replica) if replica in replicas else -1
    slot_of_pair = slots[pairs.experts]
    return [_batch(replica, _where(pairs, slot_of_pair == slot)) for slot, replica in enumerate(replicas)]


def _where(pairs: Pairs, mask: npt.NDArray[np.bool_]) -> Pairs:
    return Pairs(pairs.tokens[mask], pairs.experts[mask], pairs.weights[mask])


def _batch(replica: str, pairs: Pairs) -> ReplicaBatch:
    rows, pair_rows = np.unique(pairs.tokens, return_inverse=True)
    return ReplicaBatch(replica, rows, pair_rows.astype(np.int32), pairs.experts, pairs.weights)


def combine(
    tokens: int, hidden_size: int, dtype: torch.dtype, parts: Sequence[tuple[ReplicaBatch, torch.Tensor]]
) -> torch.Tensor:
    """Adds the partial sums ([R, H] each) into [tokens, H], in fp32 and in the given order, then rounds to `dtype`."""
    total = torch.zeros(tokens, hidden_size, dtype=torch.float32)
    for batch, partial in parts:
        if len(batch.rows) == tokens:
            total += partial
        else:
            total.index_add_(0, torch.from_numpy(batch.rows), partial.to(torch.float32))
    return total.to(dtype)


def split(batch: ReplicaBatch, max_rows: int) -> list[ReplicaBatch]:
    """Cuts a batch into batches of at most `max_rows` rows. Its pairs are in row order."""
    if len(batch.rows) <= max_rows:
        return [batch]
    pieces = []
    for first in range(0, len(batch.rows), max_rows):
        low, high = np.searchsorted(batch.pair_rows, [first, first + max_rows])
        pieces.append(
            ReplicaBatch(
                batch.replica,
                batch.rows[first : first + max_rows],
                batch.pair_rows[low:high] - np.int32(first),
                batch.pair_experts[low:high],
                batch.pair_weights[low:high],
            )
        )
    return pieces
