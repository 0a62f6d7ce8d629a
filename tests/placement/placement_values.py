"""Manifests and loads for tests of the planner."""

from __future__ import annotations

from collections.abc import Mapping

import numpy

from expertmesh.artifact.manifest import ExpertFunction, Manifest
from expertmesh.placement.arrays import Floats
from expertmesh.placement.loads import Loads

EXPERT_GIB = 2**-10
"""Of one expert of `manifest`."""


def manifest(layers: Mapping[int, int]) -> Manifest:
    return Manifest(
        name="tiny",
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        hidden_size=8,
        intermediate_size=16,
        layers=dict(layers),
        top_k=2,
        dtype="float32",
        expert_function=ExpertFunction(activation="silu"),
        fingerprint="f" * 64,
        expert_bytes=2**20,
    )


def zipf(layers: int, experts: int, exponent: float, seed: int = 0) -> Floats:
    """[L, E] shares in another order in each layer; each layer sums to 1."""
    by_rank = numpy.arange(1, experts + 1, dtype=float) ** -exponent
    generator = numpy.random.default_rng(seed)
    return numpy.stack([generator.permutation(by_rank / by_rank.sum()) for _ in range(layers)])


def loads_of(array: Floats, **more: object) -> Loads:
    return Loads.model_validate({"rows_per_s": {layer: row.tolist() for layer, row in enumerate(array)}} | more)
