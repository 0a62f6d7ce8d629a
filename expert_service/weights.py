"""The experts that this replica holds, and no others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy
import numpy.typing

from expertmesh.artifact.experts import ExpertWeights, load_experts
from expertmesh.artifact.manifest import Manifest
from expertmesh.errors import ConfigError
from expertmesh.experts import LayerExperts, format_indices


@dataclass(frozen=True)
class HeldExperts:
    """Decoder layer -> index -> weights, in host memory that maps the artifact's files."""

    manifest: Manifest
    layers: dict[int, dict[int, ExpertWeights]]

    @property
    def total_bytes(self) -> int:
        return sum(
            tensor.nbytes
            for experts in self.layers.values()
            for index, expert in experts.items()
            for tensor in expert.named(index).values()
        )

    def mask(self, layer: int) -> numpy.typing.NDArray[numpy.bool_]:
        """[E] of the layer's experts: which of them are held."""
        held = numpy.zeros(self.manifest.layers[layer], dtype=numpy.bool_)
        held[list(self.layers[layer])] = True
        return held


def load_held_experts(artifact: Path, manifest: Manifest, wanted: LayerExperts) -> HeldExperts:
    """Maps the wanted experts in place, without a copy.

    Raises ConfigError where a wanted expert does not exist, ArtifactError where its file is damaged.
    """
    _check(manifest, wanted)
    layers = {layer: load_experts(artifact, manifest, layer, wanted[layer]) for layer in sorted(wanted)}
    return HeldExperts(manifest, layers)


def _check(manifest: Manifest, wanted: LayerExperts) -> None:
    for layer, indices in wanted.items():
        if layer not in manifest.layers:
            raise ConfigError(f"experts: layer {layer} has none (MoE layers: {format_indices(set(manifest.layers))})")
        beyond = {index for index in indices if not 0 <= index < manifest.layers[layer]}
        if beyond:
            last = manifest.layers[layer] - 1
            raise ConfigError(f"experts: layer {layer} has experts 0-{last}, not {format_indices(beyond)}")
