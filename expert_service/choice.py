"""Which executor computes."""

from __future__ import annotations

import torch

from expert_service.emulated import EmulatedExecutor
from expert_service.executor import Executor, LoopExecutor
from expert_service.grouped import GroupedExecutor, grouped_mm_serves
from expert_service.native_executor import NativeExecutor, native_serves
from expert_service.packed import PackedExecutor
from expert_service.vllm_kernels import find_kernels, has_amx
from expert_service.weights import HeldExperts
from expertmesh.config import EmulatedDevice
from expertmesh.scaling.emulation import expert_cost


def build_executor(
    held: HeldExperts, device: torch.device, num_threads: int = 1, emulated: EmulatedDevice | None = None
) -> Executor:
    """The fastest executor for these experts on this device and num_threads, which load the weights too.

    With `emulated` it answers no sooner than that device would.
    """
    executor = _fastest(held, device, num_threads)
    return executor if emulated is None else EmulatedExecutor(executor, emulated, expert_cost(held.manifest))


def _fastest(held: HeldExperts, device: torch.device, num_threads: int) -> Executor:
    if grouped_mm_serves(held, device):
        return GroupedExecutor(held, device)
    if device.type == "cpu" and native_serves(held.manifest, num_threads) and not has_amx():
        return NativeExecutor(held)
    most_experts = max(map(len, held.layers.values()), default=0)
    kernels = find_kernels(held.manifest, most_experts) if device.type == "cpu" else None
    return LoopExecutor(held, device) if kernels is None else PackedExecutor(held, kernels, num_threads)
