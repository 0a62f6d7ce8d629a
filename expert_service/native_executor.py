"""Experts computed by the native core, on CPUs with AVX-512 BF16."""

from __future__ import annotations

import torch
from torch import Tensor

from expert_service.executor import Pairs
from expert_service.packing import TILE, pack_layers, pack_tiles
from expert_service.weights import HeldExperts
from expertmesh.artifact.manifest import ExpertFunction, Manifest

try:
    from expertmesh_native import Computation, Experts, can_compute_experts
except ImportError:
    Experts = can_compute_experts = None  # type: ignore[assignment, misc]


class NativeExecutor:
    """One thread, which keeps memory busy while it computes: of all kernels that are at hand the fastest from five rows
    per expert on, and with fewer as fast as memory (docs/performance.md).

    Each pair is rounded to bf16 before the sum, and the sum; the same bits whatever else is in the batch.
    """

    interleaved = False
    bias_dtype = None

    def __init__(self, held: HeldExperts) -> None:
        self._experts = Experts()
        for layer, packed in pack_layers(held, self, num_threads=1).items():
            gate_up, down = packed.weights.gate_up, packed.weights.down
            self._experts.add_layer(layer, gate_up.view(torch.uint16), down.view(torch.uint16), packed.slots)

    @property
    def computation(self) -> Computation:
        """The same as `run`, for the native server."""
        return self._experts

    def pack(self, weight: Tensor, packed: Tensor) -> None:
        pack_tiles(weight, packed)

    def run(self, layer: int, hidden_states: Tensor, pairs: Pairs) -> Tensor:
        x = hidden_states.to(torch.bfloat16).contiguous()
        sums = torch.empty_like(x)
        self._experts.run(layer, x.data_ptr(), len(x), pairs.rows, pairs.experts, pairs.weights, sums.data_ptr())
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
