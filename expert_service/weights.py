"""The experts that this replica holds, and no others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy
import numpy.typing

from expertmesh.artifact.experts import ExpertWeights, expert_shapes, load_experts
from expertmesh.artifact.manifest import Manifest
from expertmesh.errors import ConfigError
from expertmesh.experts import LayerExperts, format_indices


@dataclass(frozen=True)
class HeldExperts:
    """Which experts of an artifact are held. Weights are mapped anew by each `load`, so that whoever packs or copies
    them can let go of the mapped ones."""

    artifact: Path
    manifest: Manifest
    layers: dict[int, frozenset[int]]
    """Decoder layer -> indices."""

    @property
    def total_bytes(self) -> int:
        manifest = self.manifest
        shapes = expert_shapes(manifest.hidden_size, manifest.intermediate_size, manifest.expert_function)
        elements = sum(math.prod(shape) for shape in shapes.values())
        return elements * manifest.torch_dtype.itemsize * sum(map(len, self.layers.values()))

    def load(self, layer: int) -> dict[int, ExpertWeights]:
        """Index -> weights of one layer, in host memory that maps the artifact's file.

        Raises ArtifactError where the file is damaged.
        """
        return load_experts(self.artifact, self.manifest, layer, self.layers[layer])

    def mask(self, layer: int) -> numpy.typing.NDArray[numpy.bool_]:
        """[E] of the layer's experts: which of them are held."""
        held = numpy.zeros(self.manifest.layers[layer], dtype=numpy.bool_)
        held[list(self.layers[layer])] = True
        return held


def hold_experts(artifact: Path, manifest: Manifest, wanted: LayerExperts) -> HeldExperts:
    """Raises ConfigError where a wanted expert does not exist."""
    for layer, indices in wanted.items():
        if layer not in manifest.layers:
            raise ConfigError(f"experts: layer {layer} has none (MoE layers: {format_indices(set(manifest.layers))})")
        beyond = {index for index in indices if not 0 <= index < manifest.layers[layer]}
        if beyond:
            last = manifest.layers[layer] - 1
            raise ConfigError(f"experts: layer {layer} has experts 0-{last}, not {format_indices(beyond)}")
    return HeldExperts(artifact, manifest, {layer: frozenset(wanted[layer]) for layer in sorted(wanted)})
