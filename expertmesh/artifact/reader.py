"""A layer's expert parameters, read from a checkpoint a few experts at a time."""

from __future__ import annotations

import torch

from expertmesh.artifact.conversion import ParameterSource
from expertmesh.artifact.modules import ExpertLayer
from expertmesh.artifact.plan import Plan
from expertmesh.artifact.tensorfile import read_tensor


class ExpertReader:
    def __init__(self, plan: Plan, layer: ExpertLayer) -> None:
        self._plan = plan
        self._layer = layer
        self._whole: dict[str, torch.Tensor] = {}

    def read(self, indices: range) -> dict[str, torch.Tensor]:
        """Experts `indices` in the layout of transformers' module: name within the module -> [len(indices), ...]."""
        return {name: self._read(name, indices) for name in self._layer.parameter_names}

    def _read(self, name: str, indices: range) -> torch.Tensor:
        target = f"{self._layer.name}.{name}"
        source = self._plan.sources.experts[target]
        if source.converter is None:
            ((key,),) = source.keys.values()
            return read_tensor(self._plan.checkpoint.tensors[key], indices.start, len(indices))
        if source.by_expert:
            return self._convert(source, indices)[target]
        if target not in self._whole:
            self._whole.update(self._convert(source, None))
        return self._whole[target][indices.start : indices.stop]

    def _convert(self, source: ParameterSource, indices: range | None) -> dict[str, torch.Tensor]:
        tensors = self._plan.checkpoint.tensors
        chosen = slice(None) if indices is None else slice(indices.start, indices.stop)
        parts = {p: [read_tensor(tensors[key]) for key in keys[chosen]] for p, keys in source.keys.items()}
        return source.convert(parts, self._plan.model)
