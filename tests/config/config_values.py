"""A manifest and configs for tests that need no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expertmesh.artifact.manifest import ExpertFunction, Manifest
from expertmesh.config import ClusterConfig

GIB = 2**30


def manifest(layers: dict[int, int] | None = None, expert_bytes: int = 1024) -> Manifest:
    return Manifest(
        name="tiny",
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        hidden_size=8,
        intermediate_size=16,
        layers=layers or {1: 8, 3: 8},
        top_k=2,
        dtype="float32",
        expert_function=ExpertFunction(activation="silu"),
        fingerprint="f" * 64,
        expert_bytes=expert_bytes,
    )


def config(*groups: dict[str, Any], **more: Any) -> ClusterConfig:
    chosen = groups or ({"name": "a", "experts": "0-3"}, {"name": "b", "experts": "4-7"})
    return ClusterConfig.model_validate({"model": {"artifact": Path("/art")}, "groups": chosen} | more)
