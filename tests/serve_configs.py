"""Serve configs as the chart and `expertmesh up` make them."""

from __future__ import annotations

from typing import Any

import yaml

from expertmesh.artifact.manifest import ExpertFunction, Manifest
from expertmesh.config import ClusterConfig
from expertmesh.deployment import serve_config
from expertmesh.kubernetes.groups import known_model

POOL = {"experts": 1}
FINGERPRINT = "f" * 64


def cluster(*groups: dict[str, Any], **more: Any) -> ClusterConfig:
    """Groups `hot` and `cold` of a model with two layers of 8 experts, where none are given."""
    default: tuple[dict[str, Any], ...] = (
        {"name": "hot", "experts": "0-1", "min_replicas": 1, "max_replicas": 2},
        {"name": "cold", "experts": {"0-1": "2-7"}},
    )
    described = [{"resources": POOL} | one for one in groups or default]
    server = {"replica_host": "auto", "replica_ports": [50051, 50114], "host": "0.0.0.0"}
    engine = {"resources": {"router": 1}}
    model = {"artifact": "/models/artifact", "name": "demo"}
    own = {"model": model, "groups": described, "server": server, "engine": engine}
    return ClusterConfig.model_validate(own | more)


def manifest(expert_bytes: int = 4 * 3 * 8 * 16) -> Manifest:
    """Of the model that `cluster` divides."""
    return Manifest(
        name="demo",
        architecture="X",
        model_type="x",
        hidden_size=8,
        intermediate_size=16,
        layers={0: 8, 1: 8},
        top_k=2,
        dtype="float32",
        expert_function=ExpertFunction(activation="silu"),
        fingerprint=FINGERPRINT,
        expert_bytes=expert_bytes,
    )


def serve_text(*groups: dict[str, Any], **more: Any) -> str:
    """As Helm's toYaml writes it: keys in order of the alphabet."""
    config = cluster(*groups, **more)
    return yaml.safe_dump(serve_config(config, known_model(config.groups)), sort_keys=True)
