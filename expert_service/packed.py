"""All experts of a layer in one fused call, for CPUs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy
import torch
from numpy.typing import NDArray

from expert_service.executor import Pairs
from expert_service.topk import PairSpreader, Table, TableFiller, tables
from expert_service.vllm_kernels import MAX_ELEMENTS, Kernels
from expert_service.weights import HeldExperts
from expertmesh.artifact.experts import ExpertWeights

CHUNK_PAIRS = 4096
"""Pairs of one call, which bounds the kernel's scratch memory."""
SPREAD_PAIRS = 1024
"""Pairs that are laid out by native code: with more, it makes no difference."""


class PackedExecutor:
    """Weights packed per layer, gate_up [E, 2I, H] and down [E, H, I] of the E experts held, ascending.

    What was mapped is given back layer by layer, so that there is one copy. Sums come in the weights' type, the same
    bits whatever else is in the batch. One thread calls `run`.
    """

    def __init__(self, held: HeldExperts, kernels: Kernels, num_threads: int) -> None:
        manifest = held.manifest
        self._kernels = kernels
        self._dtype = manifest.torch_dtype
        self._max_pairs = min(CHUNK_PAIRS, MAX_ELEMENTS // (4 * max(manifest.hidden_size, manifest.intermediate_size)))
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            packed = pool.map(lambda layer: _pack(held, layer, kernels), held.layers)
            self._layers = {
                layer: (weights, _slots(manifest.layers[layer], held.layers[layer]))
                for layer, weights in zip(held.layers, packed, strict=True)
            }
        self._filler = TableFiller(self._max_pairs, kernels.pairs_per_read)
        self._spreader = PairSpreader(min(SPREAD_PAIRS, self._max_pairs), manifest.hidden_size, self._dtype)

    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        x = hidden_states if hidden_states.dtype is self._dtype else hidden_states.to(self._dtype)
        weights, slots = self._layers[layer]
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


def _slots(num_experts: int, held: frozenset[int]) -> NDArray[numpy.int32]:
    """[num_experts]: where an expert's weights stand among those held."""
    slots = numpy.full(num_experts, -1, dtype=numpy.int32)
    slots[sorted(held)] = numpy.arange(len(held), dtype=numpy.int32)
    return slots


def _pack(held: HeldExperts, layer: int, kernels: Kernels) -> ExpertWeights:
    """Reads the layer's experts from the artifact's file into the kernel's layout."""
    mapped = held.load(layer)
    experts = [mapped[index] for index in sorted(mapped)]
    target = {
        name: torch.empty((len(experts), *tensor.shape), dtype=_dtype(name, tensor, kernels))
        for name, tensor in experts[0].tensors().items()
    }
    for slot, expert in enumerate(experts):
        for name, tensor in expert.tensors().items():
            if kernels.interleaved and name.startswith("gate_up"):
                tensor = torch.stack(tensor.chunk(2), dim=1).flatten(0, 1)  # noqa: PLW2901
            if name.endswith("bias"):
                target[name][slot].copy_(tensor)
            else:
                kernels.pack(tensor, target[name][slot])
    return ExpertWeights(**target)


def _dtype(name: str, tensor: torch.Tensor, kernels: Kernels) -> torch.dtype:
    return (kernels.bias_dtype if name.endswith("bias") else None) or tensor.dtype
