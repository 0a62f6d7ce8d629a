"""One layer's experts as tensors that read an artifact's file in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from expertmesh.artifact.manifest import ExpertFunction, Manifest, experts_file
from expertmesh.errors import ArtifactError


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """One expert: gate_up [2I, H], gate above up ([I, H] where not gated); down [H, I]; biases [2I] and [H] or None."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that there are, by field."""
        tensors = {"gate_up": self.gate_up, "down": self.down}
        if self.gate_up_bias is not None:
            tensors["gate_up_bias"] = self.gate_up_bias
        if self.down_bias is not None:
            tensors["down_bias"] = self.down_bias
        return tensors

    def named(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors under their names in the experts file, in its order."""
        return {expert_key(index, name): tensor for name, tensor in self.tensors().items()}


def expert_key(index: int, name: str) -> str:
    """A tensor's name in the experts file."""
    return f"{index}.{name}"


def expert_shapes(hidden: int, inner: int, function: ExpertFunction) -> dict[str, tuple[int, ...]]:
    """Shapes of one expert's tensors, by the fields of `ExpertWeights`."""
    rows = 2 * inner if function.gated else inner
    shapes: dict[str, tuple[int, ...]] = {"gate_up": (rows, hidden), "down": (hidden, inner)}
    if function.bias:
        shapes |= {"gate_up_bias": (rows,), "down_bias": (hidden,)}
    return shapes


def load_experts(artifact: Path, manifest: Manifest, layer: int, indices: Iterable[int]) -> dict[int, ExpertWeights]:
    """The experts `indices` of decoder layer `layer`, mapped from the file without a copy: read them only.

    A page comes into memory when it is first read. Raises ArtifactError that names the file and the expert where one
    is absent or has another shape or type than the manifest says.
    """
    if layer not in manifest.layers:
        raise ArtifactError(f"{artifact}: layer {layer} has no experts; MoE layers: {sorted(manifest.layers)}")
    shapes = expert_shapes(manifest.hidden_size, manifest.intermediate_size, manifest.expert_function)
    return map_experts(experts_file(artifact, layer), shapes, manifest.torch_dtype, indices)


def map_experts(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, indices: Iterable[int]
) -> dict[int, ExpertWeights]:
    """`load_experts` for one file, with what it must hold."""
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            return {index: _load(file, present, path, shapes, dtype, index) for index in sorted(set(indices))}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: {error}") from None


def _load(
    file: Any, present: set[str], path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, index: int
) -> ExpertWeights:
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        key = expert_key(index, name)
        if key not in present:
            raise ArtifactError(f"{path}: expert {index} has no tensor {key}")
        tensor: torch.Tensor = file.get_tensor(key)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ArtifactError(f"{path}: expert {index}: {key} is {found}, not {dtype} {list(shape)}")
        tensors[name] = tensor
    return ExpertWeights(**tensors)
