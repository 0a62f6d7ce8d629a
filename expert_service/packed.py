"""All experts of a layer in one fused call, for CPUs."""

from __future__ import annotations

import numpy
import torch
from numpy.typing import NDArray

from expert_service.executor import Pairs
from expert_service.packing import pack_layers
from expert_service.topk import PairSpreader, Table, TableFiller, tables
from expert_service.vllm_kernels import MAX_ELEMENTS, Kernels
from expert_service.weights import HeldExperts
from expertmesh.artifact.experts import ExpertWeights

CHUNK_PAIRS = 4096
"""Pairs of one call, which bounds the kernel's scratch memory."""
SPREAD_PAIRS = 1024
"""Pairs that are laid out by native code: with more, it makes no difference."""


class PackedExecutor:
    """Weights packed per layer. Sums come in the weights' type, the same bits whatever else is in the batch. One thread
    calls `run`."""

    def __init__(self, held: HeldExperts, kernels: Kernels, num_threads: int) -> None:
        manifest = held.manifest
        self._kernels = kernels
        self._dtype = manifest.torch_dtype
        self._max_pairs = min(CHUNK_PAIRS, MAX_ELEMENTS // (4 * max(manifest.hidden_size, manifest.intermediate_size)))
        self._layers = pack_layers(held, kernels, num_threads)
        self._filler = TableFiller(self._max_pairs, kernels.pairs_per_read)
        self._spreader = PairSpreader(min(SPREAD_PAIRS, self._max_pairs), manifest.hidden_size, self._dtype)

    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        x = hidden_states if hidden_states.dtype is self._dtype else hidden_states.to(self._dtype)
        weights, slots = self._layers[layer].weights, self._layers[layer].slots
        table = self._filler.fill(pairs, slots, x.shape[0])
        if table is not None:
            return self._compute(weights, x, *table)
        if self._kernels.by_pair:
            return self._run_pairs(weights, slots, x, pairs)
        return self._run_tables(weights, x, tables(pairs, slots, len(x), self._kernels.pairs_per_read))

    def _run_pairs(
        self, weights: ExpertWeights, slots: NDArray[numpy.int32], x: torch.Tensor, pairs: Pairs
    ) -> torch.Tensor:
        """Each pair as a row of its own, summed up afterwards in the order in which the kernel would."""
        if self._spreader.fits(pairs):
            return self._spreader.sum(self._compute(weights, *self._spreader.spread(pairs, slots, x)), len(x))
        order = numpy.lexsort((pairs.experts, pairs.rows))
        rows = torch.from_numpy(pairs.rows[order])
        ids = torch.from_numpy(slots[pairs.experts[order]])[:, None]
        topk_weights = torch.from_numpy(pairs.weights[order])[:, None]
        sums = torch.zeros(x.shape, dtype=torch.float32)
        for start in range(0, len(rows), self._max_pairs):
            part = slice(start, start + self._max_pairs)
            output = self._compute(weights, x.index_select(0, rows[part]), ids[part], topk_weights[part])
            sums.index_add_(0, rows[part], output.float())
        return sums.to(self._dtype)

    def _run_tables(self, weights: ExpertWeights, x: torch.Tensor, found: list[Table]) -> torch.Tensor:
        sums = None
        for part in (part for table in found for part in table.parts(self._max_pairs)):
            ids, topk_weights = torch.from_numpy(part.slots), torch.from_numpy(part.weights)
            if part.rows is None:
                return self._compute(weights, x, ids, topk_weights)
            rows = torch.from_numpy(part.rows)
            sums = torch.zeros_like(x) if sums is None else sums
            sums.index_copy_(0, rows, self._compute(weights, x.index_select(0, rows), ids, topk_weights))
        return torch.zeros_like(x) if sums is None else sums

    def _compute(
        self, weights: ExpertWeights, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        output = torch.empty_like(x)
        self._kernels.run(output, x, weights, ids, topk_weights)
        return output
