"""What one expert computes: the definition that `prepare` verifies against transformers and that replicas run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch.nn import functional as F

from expertmesh.artifact.experts import ExpertWeights
from expertmesh.artifact.manifest import ExpertFunction

SWIGLU_CLAMPED = "swiglu_clamped"


@torch.no_grad()
def expert_forward(x: torch.Tensor, weights: ExpertWeights, function: ExpertFunction) -> torch.Tensor:
    """x [R, H] -> [R, H], in the type of `x` and `weights`."""
    inner = activate(F.linear(x, weights.gate_up, weights.gate_up_bias), function)
    return F.linear(inner, weights.down, weights.down_bias)


def activate(gate_up: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
    """What stands between an expert's two products: [R, 2I] -> [R, I] ([R, I] -> [R, I] where not gated)."""
    if not function.gated:
        return activation(function.activation)(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    if function.activation == SWIGLU_CLAMPED:
        assert function.alpha is not None and function.limit is not None
        gate, up = gate.clamp(max=function.limit), up.clamp(-function.limit, function.limit)
        return (up + 1) * gate * torch.sigmoid(function.alpha * gate)
    return activation(function.activation)(gate) * up


COMMON: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""What transformers' ACT2FN gives under these names, without the seconds that it takes to load."""


@cache
def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """transformers' activation of that name; raises KeyError where it has none."""
    if name in COMMON:
        return COMMON[name]
    from transformers.activations import ACT2FN

    made: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return made
