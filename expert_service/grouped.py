"""All experts of a layer in two grouped products, for GPUs."""

from __future__ import annotations

import numpy
import torch
from torch.nn import functional as F

from expert_service.executor import Pairs, add_by_row
from expert_service.staging import columns_to_device, to_device, to_host
from expert_service.weights import HeldExperts
from expertmesh.artifact.experts import ExpertWeights
from expertmesh.artifact.function import activate

ALIGNMENT = 8
"""grouped_mm wants rows of whole 16 bytes; elements of bf16."""


def grouped_mm_serves(held: HeldExperts, device: torch.device) -> bool:
    """Whether torch's grouped product computes these experts on this device."""
    manifest = held.manifest
    return (
        device.type == "cuda"
        and manifest.dtype == "bfloat16"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and manifest.hidden_size % ALIGNMENT == 0
        and manifest.intermediate_size % ALIGNMENT == 0
    )


class GroupedExecutor:
    """Weights stacked per layer on the device: gate_up [E, 2I, H] and down [E, H, I] of the E experts held, ascending.

    Everything is enqueued on the device's current stream of the calling thread; the copy of the sums back to the host,
    rounded to the weights' type, waits for it.
    """

    def __init__(self, held: HeldExperts, device: torch.device) -> None:
        self._function = held.manifest.expert_function
        self._dtype = held.manifest.torch_dtype
        self._device = device
        self._weights = {}
        self._slots = {}
        for layer in held.layers:
            experts = held.load(layer)
            self._weights[layer] = _stack([experts[index] for index in sorted(experts)], device)
            slots = numpy.full(held.manifest.layers[layer], -1, dtype=numpy.int32)
            slots[sorted(experts)] = numpy.arange(len(experts), dtype=numpy.int32)
            self._slots[layer] = slots

    @torch.inference_mode()
    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        if not len(pairs.rows):
            return torch.zeros(hidden_states.shape, dtype=torch.float32)
        pairs = pairs.by_expert()
        slots = self._slots[layer][pairs.experts]
        weights = self._weights[layer]
        ends = numpy.cumsum(numpy.bincount(slots, minlength=len(weights.gate_up)), dtype=numpy.int32)
        rows, slot_of_pair, offsets = columns_to_device([pairs.rows, slots, ends], self._device)
        x_PH = to_device(hidden_states, self._device).to(self._dtype).index_select(0, rows)
        inner_PI = activate(
            _grouped_linear(x_PH, weights.gate_up, weights.gate_up_bias, offsets, slot_of_pair), self._function
        )
        output_PH = _grouped_linear(inner_PI, weights.down, weights.down_bias, offsets, slot_of_pair)
        sums = torch.zeros(hidden_states.shape, dtype=torch.float32, device=self._device)
        add_by_row(sums, output_PH, pairs)
        return to_host(sums.to(self._dtype))


def _stack(experts: list[ExpertWeights], device: torch.device) -> ExpertWeights:
    def stacked(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return None
        target = torch.empty((len(present), *present[0].shape), dtype=present[0].dtype, device=device)
        for slot, tensor in enumerate(present):
            target[slot].copy_(tensor)
        return target

    gate_up = stacked([expert.gate_up for expert in experts])
    down = stacked([expert.down for expert in experts])
    assert gate_up is not None and down is not None
    biases = stacked([expert.gate_up_bias for expert in experts]), stacked([expert.down_bias for expert in experts])
    return ExpertWeights(gate_up, down, *biases)


def _grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """x [P, in] in runs that end at `offsets` [E], times weight [E, out, in]: [P, out]."""
    product = F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=offsets)
    return product if bias is None else product + bias.index_select(0, slots)
