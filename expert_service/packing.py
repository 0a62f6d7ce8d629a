"""A layer's held experts in the layout that a kernel wants."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from expert_service.weights import HeldExperts
from expertmesh.artifact.experts import ExpertWeights

TILE = 32
"""Rows of a matrix that stand side by side."""


class Layout(Protocol):
    @property
    def interleaved(self) -> bool:
        """Whether gate and up rows take turns, instead of all gate rows above all up rows."""
        ...

    @property
    def bias_dtype(self) -> torch.dtype | None:
        """None: the weights' type."""
        ...

    def pack(self, weight: Tensor, packed: Tensor) -> None:
        """weight [out, in] of one expert into the kernel's layout: `packed`, of the same shape."""
        ...


@dataclass(frozen=True, eq=False)
class PackedLayer:
    weights: ExpertWeights
    """gate_up [E, 2I, H] and down [E, H, I] of the E experts held, ascending."""
    slots: NDArray[numpy.int32]
    """[num_experts]: where an expert's weights stand among those held; -1: not held."""


def pack_layers(held: HeldExperts, layout: Layout, num_threads: int) -> dict[int, PackedLayer]:
    """What was mapped is given back layer by layer, so that there is one copy."""
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        packed = pool.map(lambda layer: _pack(held, layer, layout), held.layers)
        return {
            layer: PackedLayer(weights, _slots(held.manifest.layers[layer], held.layers[layer]))
            for layer, weights in zip(held.layers, packed, strict=True)
        }


def pack_tiles(weight: Tensor, packed: Tensor) -> None:
    """weight [out, in], two bytes per element, as [out / 32, in / 2, 32] pairs of elements."""
    tiles = weight.contiguous().view(torch.int32).view(-1, TILE, weight.shape[1] // 2).transpose(1, 2)
    packed.view(torch.int32).view(tiles.shape).copy_(tiles)


def _slots(num_experts: int, held: frozenset[int]) -> NDArray[numpy.int32]:
    slots = numpy.full(num_experts, -1, dtype=numpy.int32)
    slots[sorted(held)] = numpy.arange(len(held), dtype=numpy.int32)
    return slots


def _pack(held: HeldExperts, layer: int, layout: Layout) -> ExpertWeights:
    """Reads the layer's experts from the artifact's file."""
    mapped = held.load(layer)
    experts = [mapped[index] for index in sorted(mapped)]
    target = {
        name: torch.empty((len(experts), *tensor.shape), dtype=_dtype(name, tensor, layout))
        for name, tensor in experts[0].tensors().items()
    }
    for slot, expert in enumerate(experts):
        for name, tensor in expert.tensors().items():
            if layout.interleaved and name.startswith("gate_up"):
                tensor = torch.stack(tensor.chunk(2), dim=1).flatten(0, 1)  # noqa: PLW2901
            if name.endswith("bias"):
                target[name][slot].copy_(tensor)
            else:
                layout.pack(tensor, target[name][slot])
    return ExpertWeights(**target)


def _dtype(name: str, tensor: Tensor, layout: Layout) -> torch.dtype:
    return (layout.bias_dtype if name.endswith("bias") else None) or tensor.dtype
