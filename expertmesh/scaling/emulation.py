"""The time that a modelled accelerator takes for one batch; the emulated device and the simulator share it."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import EmulatedDevice


@dataclass(frozen=True)
class ExpertCost:
    """Of one expert: FLOPs per (row, expert) pair, bytes of its weights, bytes of a row in and out."""

    flops_per_pair: float
    weight_bytes: float
    row_bytes: float


def expert_cost(manifest: Manifest) -> ExpertCost:
    """Two FLOPs per weight and pair; gated experts have three matrices [H, I], plain ones two."""
    matrices = 3 if manifest.expert_function.gated else 2
    weights = matrices * manifest.hidden_size * manifest.intermediate_size
    width = 4 if manifest.dtype == "float32" else 2
    return ExpertCost(2.0 * weights, float(manifest.expert_bytes), 2.0 * manifest.hidden_size * width)


def batch_s(device: EmulatedDevice, cost: ExpertCost, pairs: int, experts: int) -> float:
    """Seconds for a batch of `pairs` (row, expert) pairs that touches `experts` different experts.

    The roofline model (Williams, Waterman, Patterson 2009): the slower of arithmetic and memory, where each touched
    expert's weights are read once per batch.
    """
    compute_s = pairs * cost.flops_per_pair / (device.teraflops * 1e12)
    memory_s = (experts * cost.weight_bytes + pairs * cost.row_bytes) / (device.memory_gb_per_s * 1e9)
    return max(compute_s, memory_s) + device.overhead_us * 1e-6
