"""The Serve config that a cluster config becomes, checked with Ray's own schema."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import ray
from config_values import config, manifest
from ray.serve.schema import ServeDeploySchema

from expertmesh.args import GroupArgs, RouterArgs
from expertmesh.config import ClusterConfig
from expertmesh.deployment import serve_config

SCALED = config(
    {"name": "a", "experts": "0-3", "num_cpus": 2, "min_replicas": 2, "max_replicas": 2},
    {"name": "b", "experts": {"1-3": "4-7"}, "num_gpus": 0.5, "max_replicas": 5},
    server={"http_port": 8123, "grpc_port": 9123, "replica_ports": (5000, 5009)},
)


def layers() -> dict[int, int]:
    return {1: 8, 2: 8, 3: 8}


def applications(wanted: ClusterConfig) -> dict[str, dict[str, Any]]:
    made = serve_config(wanted, manifest(layers()))
    assert json.loads(json.dumps(made)) == made | {"applications": json.loads(json.dumps(made["applications"]))}
    return {one["name"]: one for one in made["applications"]}


def test_ray_accepts_it() -> None:
    assert ray.__version__ == "2.60.0"
    schema = ServeDeploySchema.model_validate(serve_config(SCALED, manifest(layers())))
    assert [one.name for one in schema.applications] == ["directory", "experts-a", "experts-b", "router"]
    assert (schema.http_options.port, schema.grpc_options.port) == (8123, 9123)
    prefixes = {one.name: one.route_prefix for one in schema.applications}
    assert prefixes["router"] == "/"
    assert prefixes["experts-a"] is prefixes["experts-b"] is None


def test_servicer_and_builders_exist() -> None:
    made = serve_config(SCALED, manifest(layers()))
    for path in made["grpc_options"]["grpc_servicer_functions"]:
        module, _, function = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function))
    for path in ("expertmesh.directory.app:build", "expert_service.app:build"):
        assert path in {one["import_path"] for one in made["applications"]}
        module, _, function = path.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_args_are_what_the_applications_take() -> None:
    made = applications(SCALED)
    b = GroupArgs.model_validate(made["experts-b"]["args"])
    assert b.experts == {1: "4-7", 2: "4-7", 3: "4-7"}
    assert (b.device, b.directory, b.ports) == ("cuda", "127.0.0.1:9123", (5000, 5009))
    assert GroupArgs.model_validate(made["experts-a"]["args"]).num_threads == 2
    assert RouterArgs.model_validate(made["router"]["args"]).name == "tiny"


def test_bounds_and_resources() -> None:
    made = applications(SCALED)
    (a,), (b,) = made["experts-a"]["deployments"], made["experts-b"]["deployments"]
    assert a["num_replicas"] == 2
    assert "autoscaling_config" not in a
    assert b["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 5}
    assert "num_replicas" not in b
    assert b["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0.5}


@pytest.mark.parametrize("group", ["a", "b"])
def test_changed_bounds_change_no_args(group: str) -> None:
    """Since changed args would restart the application."""
    groups = [one.model_dump() | ({"max_replicas": 7} if one.name == group else {}) for one in SCALED.groups]
    changed = SCALED.model_dump() | {"groups": groups, "engine": {"max_replicas": 3}}
    before, after = applications(SCALED), applications(ClusterConfig.model_validate(changed))
    assert {name: one["args"] for name, one in before.items()} == {name: one["args"] for name, one in after.items()}
    assert before[f"experts-{group}"] != after[f"experts-{group}"]


def test_both_ends_get_the_tls_files() -> None:
    files = {"ca": "/tls/ca.pem", "certificate": "/tls/tls.crt", "key": "/tls/tls.key", "server_name": "experts"}
    made = applications(config(security={"tls": files}))
    assert made["experts-a"]["args"]["tls"] == made["router"]["args"]["tls"] == files
    assert (
        GroupArgs.model_validate(made["experts-a"]["args"]).tls == RouterArgs.model_validate(made["router"]["args"]).tls
    )
