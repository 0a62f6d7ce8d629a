"""The proof that written experts compute what transformers' module computes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn import functional as F

from expertmesh.artifact.experts import ExpertWeights
from expertmesh.artifact.function import SWIGLU_CLAMPED, activate, expert_forward
from expertmesh.artifact.manifest import ExpertFunction
from expertmesh.artifact.modules import ExpertLayer, activation_names
from expertmesh.errors import ArtifactError

TOLERANCE = 5e-5
"""Largest difference of an element over its row's root mean square, in fp32."""
SCALES = (1.0, 4.0, 16.0)
"""Of the rows between the two products, so that saturation and clamps are reached."""
ROWS = 4
"""Per expert and scale."""


@torch.no_grad()
def derive_function(layer: ExpertLayer) -> ExpertFunction:
    """The function of a layer's experts, found by trying those that an artifact can name.

    Raises ArtifactError, with the module's class and the nearest candidate's deviation, where none is equal.
    """
    module, (_, inner) = layer.module, layer.sizes
    gated, bias = bool(module.has_gate), bool(module.has_bias)
    candidates = [ExpertFunction(activation=name, gated=gated, bias=bias) for name in activation_names(module)]
    alpha, limit = (_number(module, names) for names in (("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")))
    if gated and alpha is not None and limit is not None:
        candidates.append(ExpertFunction(activation=SWIGLU_CLAMPED, bias=bias, alpha=alpha, limit=limit))
    noise = torch.randn(ROWS, 2 * inner if gated else inner, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([noise * scale for scale in SCALES])
    wanted = layer.gate_as_module(rows)
    deviations = {candidate: deviation(activate(rows, candidate), wanted) for candidate in candidates}
    if not deviations:
        raise ArtifactError(f"{layer.class_name}: its activation is none that an artifact can name")
    nearest = min(deviations, key=lambda candidate: deviations[candidate])
    if not deviations[nearest] <= TOLERANCE:
        raise _refusal(layer, nearest, deviations[nearest])
    return nearest


def try_function(layer: ExpertLayer, function: ExpertFunction) -> None:
    """Verifies `function` on one expert of random weights; raises ArtifactError where the module computes another."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(1, *shape[1:], generator=generator) / math.sqrt(max(shape[1:]))
        for name, shape in layer.shapes.items()
    }
    verify_experts(layer, weights, range(1), layer.split(weights), function)


@torch.no_grad()
def verify_experts(
    layer: ExpertLayer,
    parameters: Mapping[str, torch.Tensor],
    indices: range,
    experts: list[ExpertWeights],
    function: ExpertFunction,
) -> None:
    """Compares `experts` (of `indices`) with transformers' module on `parameters`, which stack the same experts.

    Both run in fp32 on random rows with random gate weights. Raises ArtifactError that names layer and expert.
    """
    generator = torch.Generator().manual_seed(layer.index)
    ours, inputs = [], []
    for index, expert in zip(indices, experts, strict=True):
        cast = ExpertWeights(**{name: tensor.float() for name, tensor in expert.tensors().items()})
        if not all(bool(tensor.isfinite().all()) for tensor in cast.tensors().values()):
            raise ArtifactError(f"layer {layer.index}: expert {index}: its weights are not all finite numbers")
        rows = _rows(cast, generator)
        inputs.append(rows)
        ours.append(expert_forward(rows, cast, function))
    x = torch.cat(inputs)
    picked = torch.arange(len(experts)).repeat_interleave(len(inputs[0]))[:, None]
    weight = torch.rand(len(x), 1, generator=generator) * 0.75 + 0.25
    theirs: torch.Tensor = layer.materialise(parameters)(x, picked, weight)
    shape = (len(experts), len(inputs[0]), -1)
    for index, mine, yours in zip(indices, (torch.cat(ours) * weight).view(shape), theirs.view(shape), strict=True):
        if not (found := deviation(mine, yours)) <= TOLERANCE:
            raise _refusal(layer, function, found, f"layer {layer.index}: expert {index}: ")


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the root mean square of its row; nan where either has one."""
    scale = theirs.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return float(((ours - theirs).abs() / scale).max())


def _rows(expert: ExpertWeights, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(ROWS * len(SCALES), expert.gate_up.shape[1], generator=generator)
    spread = F.linear(noise, expert.gate_up).std()
    scales = torch.tensor(SCALES).repeat_interleave(ROWS)[:, None]
    return noise * scales / spread if spread > 0 else noise


def _number(module: object, names: tuple[str, ...]) -> float | None:
    found = [getattr(module, name, None) for name in names]
    return next((float(value) for value in found if isinstance(value, int | float)), None)


def _refusal(layer: ExpertLayer, function: ExpertFunction, found: float, where: str = "") -> ArtifactError:
    return ArtifactError(
        f"{where}{layer.class_name}: this expert function can't be reproduced: {function.activation} is off by "
        f"{found:.1e} of a row's size, more than {TOLERANCE:.0e}"
    )
