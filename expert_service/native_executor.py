"""Experts computed by the native core, on CPUs with AVX-512 BF16."""

from __future__ import annotations

import torch
from torch import Tensor

from expert_service.executor import Pairs
from expert_service.packing import TILE, pack_layers, pack_tiles
from expert_service.weights import HeldExperts
from expertmesh.artifact.manifest import ExpertFunction, Manifest

try:
    from expertmesh_native import can_compute_experts, compute_experts
except ImportError:
    can_compute_experts = compute_experts = None  # type: ignore[assignment]


class NativeExecutor:
    """One thread, which keeps memory busy while it computes: of all kernels that are at hand the fastest from five rows
    per expert on, and with fewer as fast as memory (docs/performance.md).

    Each pair is rounded to bf16 before the sum, and the sum; the same bits whatever else is in the batch.
    """

    interleaved = False
    bias_dtype = None

    def __init__(self, held: HeldExperts) -> None:
        self._sizes = held.manifest.hidden_size, held.manifest.intermediate_size
        self._layers = pack_layers(held, self, num_threads=1)

    def pack(self, weight: Tensor, packed: Tensor) -> None:
        pack_tiles(weight, packed)

    def run(self, layer: int, hidden_states: Tensor, pairs: Pairs) -> Tensor:
        x = hidden_states.to(torch.bfloat16).contiguous()
        packed, sums = self._layers[layer], torch.empty_like(x)
        gate_up, down = packed.weights.gate_up, packed.weights.down
        compute_experts(
            gate_up.data_ptr(), down.data_ptr(), len(down), *self._sizes, x.data_ptr(), len(x),
            pairs.rows, pairs.experts, pairs.weights, packed.slots, sums.data_ptr(),
        )  # fmt: skip
        return sums


def native_serves(manifest: Manifest, num_threads: int) -> bool:
    """Whether the native core computes these experts on this machine with so many threads."""
    return (
        can_compute_experts is not None
        and can_compute_experts()
        and num_threads == 1
        and manifest.dtype == "bfloat16"
        and manifest.expert_function == ExpertFunction(activation="silu")
        and manifest.hidden_size % TILE == manifest.intermediate_size % TILE == 0
    )
