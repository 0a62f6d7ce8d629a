"""Computes a batch: the weighted partial sums of the experts held here, one per row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy
import torch
from numpy.typing import NDArray

from expert_service.staging import to_device, to_host
from expert_service.weights import HeldExperts
from expertmesh.artifact.experts import ExpertWeights
from expertmesh.artifact.function import expert_forward

PAGE_BYTES = 4096
CHUNK_PAIRS = 4096
"""Pairs computed at a time, which bounds the memory that a long prompt takes."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """The P (row, expert) pairs of a batch and the gate's weights, as columns."""

    rows: NDArray[numpy.int32]
    experts: NDArray[numpy.int32]
    weights: NDArray[numpy.float32]

    def by_expert(self) -> Pairs:
        """The same pairs with those of one expert side by side, experts ascending; equals keep their order."""
        order = numpy.argsort(self.experts, kind="stable")
        return Pairs(self.rows[order], self.experts[order], self.weights[order])

    def part(self, start: int, stop: int) -> Pairs:
        return Pairs(self.rows[start:stop], self.experts[start:stop], self.weights[start:stop])


class Executor(Protocol):
    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Per row of hidden_states [R, H], the sum over its pairs of weight * expert(row): [R, H], in host memory.

        Rows may come in another type than the weights', in which the experts compute; weights are applied and sums
        taken in fp32, by ascending expert, so that a row's sum does not depend on the other rows. Given are they in
        fp32, or rounded to the weights' type; each pair may be rounded to it before.
        """
        ...


class LoopExecutor:
    """One expert after another, each over all of its rows. On a CPU the weights are used where they are mapped."""

    def __init__(self, held: HeldExperts, device: torch.device) -> None:
        self._function = held.manifest.expert_function
        self._dtype = held.manifest.torch_dtype
        self._device = device
        self._layers = {
            layer: {index: _place(expert, device) for index, expert in held.load(layer).items()}
            for layer in held.layers
        }

    @torch.inference_mode()
    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        sums = torch.zeros(hidden_states.shape, dtype=torch.float32, device=self._device)
        hidden_states = to_device(hidden_states, self._device).to(self._dtype)
        pairs = pairs.by_expert()
        for start in range(0, len(pairs.rows), CHUNK_PAIRS):
            part = pairs.part(start, start + CHUNK_PAIRS)
            add_by_row(sums, self._compute(self._layers[layer], hidden_states, part), part)
        return to_host(sums)

    def _compute(self, experts: dict[int, ExpertWeights], hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """[P, H]: each pair's expert of its row."""
        x_PH = hidden_states.index_select(0, to_device(torch.from_numpy(pairs.rows), self._device))
        bounds = [0, *(numpy.flatnonzero(numpy.diff(pairs.experts)) + 1).tolist(), len(pairs.rows)]
        outputs = [
            expert_forward(x_PH[start:stop], experts[int(pairs.experts[start])], self._function)
            for start, stop in pairwise(bounds)
        ]
        return torch.cat(outputs)


def add_by_row(sums: torch.Tensor, outputs: torch.Tensor, pairs: Pairs) -> None:
    """Adds weight * output [P, H] of each pair to its row of sums [R, H] fp32, in the order of the pairs."""
    weighted = outputs.float() * to_device(torch.from_numpy(pairs.weights), sums.device)[:, None]
    if sums.device.type == "cpu":
        sums.index_add_(0, torch.from_numpy(pairs.rows), weighted)
    else:
        add_in_turns(sums, weighted, pairs.rows)


def add_in_turns(sums: torch.Tensor, weighted: torch.Tensor, rows: NDArray[numpy.int32]) -> None:
    """`index_add_` in a fixed order, which a GPU's has not: each turn adds the next pair of the rows that have one."""
    count, num_rows = len(rows), len(sums)
    order = numpy.argsort(rows, kind="stable")
    pairs_of_row = numpy.bincount(rows, minlength=num_rows)
    turn = numpy.empty(count, dtype=numpy.int64)
    turn[order] = numpy.arange(count) - (numpy.cumsum(pairs_of_row) - pairs_of_row)[rows[order]]
    pair_of = numpy.full((int(pairs_of_row.max()), num_rows), count, dtype=numpy.int64)
    pair_of[turn, rows] = numpy.arange(count)
    padded = torch.cat([weighted, weighted.new_zeros(1, weighted.shape[1])])
    for pair_of_row in to_device(torch.from_numpy(pair_of), sums.device):
        sums += padded.index_select(0, pair_of_row)


def _place(expert: ExpertWeights, device: torch.device) -> ExpertWeights:
    """On a CPU the mapped tensors themselves, each page read once so that no request waits for the disk."""
    if device.type == "cpu":
        for tensor in expert.named(0).values():
            tensor.view(torch.uint8).flatten()[::PAGE_BYTES].sum()
        return expert
    return ExpertWeights(
        gate_up=expert.gate_up.to(device),
        down=expert.down.to(device),
        gate_up_bias=None if expert.gate_up_bias is None else expert.gate_up_bias.to(device),
        down_bias=None if expert.down_bias is None else expert.down_bias.to(device),
    )
