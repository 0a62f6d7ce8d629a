"""The examples' sizes: the GPUs that their names say, in memory that holds what their groups take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.utils.quantity import parse_quantity
from test_serve_config import merged

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import ClusterConfig
from expertmesh.coverage import GIB, check_coverage
from expertmesh.errors import ConfigError
from expertmesh.placement.shapes import shape_of
from expertmesh.placement.sizing import Sizing, size_of_shape
from tools.chart.helm import CHART, ROOT

GB = 10**9
EXAMPLES = {path: int(path.stem.split("-")[-2]) for path in sorted(CHART.glob("examples/*-gpus.yaml"))}
"""With the GPUs that their names say."""
MODEL_POD = ROOT / "examples" / "kubernetes" / "model-pod.yaml"


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def example(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def config_of(example: Path) -> ClusterConfig:
    return ClusterConfig.model_validate(merged(example)["cluster"])


def pools_of(example: Path) -> dict[str, dict[str, Any]]:
    """By the resource that names them; with all defaults."""
    values = merged(example)
    return {"router": values["router"], **{pool["name"]: pool for pool in values["expertPools"]}}


def shape_in_bfloat16(example: Path) -> tuple[Manifest, Sizing]:
    name, shape = shape_of(config_of(example).model.name)
    assert shape.trunk is not None
    trunk = shape.trunk.model_copy(update={"bytes_per_weight": 2})
    shape = shape.model_copy(update={"bytes_per_weight": 2, "trunk": trunk})
    manifest = shape.manifest(name)
    return manifest, size_of_shape(manifest, shape)


def comment_of(example: Path) -> str:
    """What the file says of itself first, as one line."""
    lines = example.read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines[: lines.index("cluster:")])


def said(example: Path, pattern: str) -> list[float]:
    """The numbers in its comment; fails where it does not say such a thing."""
    found = re.search(pattern.replace("N", r"(\d+(?:\.\d+)?)"), comment_of(example))
    assert found, f"{pattern} is not in: {comment_of(example)}"
    return [float(one) for one in found.groups()]


def test_all_pools_at_their_most_are_the_gpus_of_the_name(example: Path) -> None:
    pools = pools_of(example)
    assert sum(pool["maxReplicas"] * pool["gpu"]["count"] for pool in pools.values()) == EXAMPLES[example]
    assert said(example, "on N GPUs of N GB")[0] == EXAMPLES[example]


def test_replicas_have_the_gpus_that_they_ask_for(example: Path) -> None:
    """All at their fewest in what pools have at their fewest; and no pod is too small for one."""
    config, pools = config_of(example), pools_of(example)
    fewest = dict.fromkeys(pools, 0.0)
    for group in config.groups:
        (pool,) = group.resources or {}
        fewest[pool] += group.num_gpus * group.min_replicas
        assert 0 < group.num_gpus <= pools[pool]["gpu"]["count"]
    fewest["router"] += config.engine.num_gpus * config.engine.min_replicas
    assert fewest == {name: pool["minReplicas"] * pool["gpu"]["count"] for name, pool in pools.items()}
    most = config.engine.num_gpus * config.engine.max_replicas
    assert most == pools["router"]["maxReplicas"] * pools["router"]["gpu"]["count"]


def test_groups_hold_all_experts_in_their_memory(example: Path) -> None:
    manifest, _ = shape_in_bfloat16(example)
    config = config_of(example)
    check_coverage(config, manifest)
    _, gpu_gb = said(example, "on N GPUs of N GB")
    for group in config.groups:
        held = sum(map(len, group.expert_sets(manifest).values())) * manifest.expert_bytes
        assert group.memory_gib is not None
        assert held < group.memory_gib * GIB < gpu_gb * GB * group.num_gpus
    small = [group.model_copy(update={"memory_gib": held / GIB - 0.1}) for group in config.groups]
    with pytest.raises(ConfigError, match="GiB of experts, memory_gib is"):
        check_coverage(config.model_copy(update={"groups": small}), manifest)


def test_comments_say_what_the_model_takes(example: Path) -> None:
    manifest, sizing = shape_in_bfloat16(example)
    assert sizing.trunk_gib is not None
    (group, *_) = config_of(example).groups
    held = sum(map(len, group.expert_sets(manifest).values())) * manifest.expert_bytes
    experts = r"(?:take|parameters,) N GB in bfloat16"
    for pattern, size in (
        (experts, sizing.experts_gib * GIB),
        (r"trunk (?:takes )?N GB", sizing.trunk_gib * GIB),
        (r"make a group of N GB", held),
    ):
        assert said(example, pattern) == pytest.approx([size / GB], rel=0.1 if "trunk" in pattern else 0.01)


def test_volumes_hold_checkpoint_and_artifact() -> None:
    mixtral, deepseek = (shape_in_bfloat16(path)[1] for path in reversed(EXAMPLES))
    values = merged(next(path for path in EXAMPLES if path.stem.startswith("mixtral")))
    assert parse_quantity(values["model"]["size"]) > 2 * total(mixtral)
    claim, _ = yaml.safe_load_all(MODEL_POD.read_text())
    assert parse_quantity(claim["spec"]["resources"]["requests"]["storage"]) > 2.5 * total(deepseek)


def total(sizing: Sizing) -> float:
    assert sizing.trunk_gib is not None
    return (sizing.experts_gib + sizing.trunk_gib) * GIB
