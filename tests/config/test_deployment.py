"""The Serve config that a cluster config becomes, checked with Ray's own schema."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import ray
from config_values import config, manifest
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from expertmesh.args import GroupArgs, RouterArgs
from expertmesh.config import ClusterConfig, EmulatedDevice, ScalingSection
from expertmesh.deployment import serve_config
from expertmesh.scaling.serve_policy import GroupPolicy

pytestmark = pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")

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
    assert b.experts == {"1-3": "4-7"}
    assert (b.device, b.directory, b.ports) == ("cuda", "127.0.0.1:9123", (5000, 5009))
    assert GroupArgs.model_validate(made["experts-a"]["args"]).num_threads == 2
    assert RouterArgs.model_validate(made["router"]["args"]).name == "tiny"


def test_bounds_and_resources() -> None:
    made = applications(SCALED)
    (a,), (b,) = made["experts-a"]["deployments"], made["experts-b"]["deployments"]
    assert [a["autoscaling_config"][key] for key in ("min_replicas", "max_replicas")] == [2, 2]
    assert [b["autoscaling_config"][key] for key in ("min_replicas", "max_replicas")] == [1, 5]
    assert "num_replicas" not in a | b
    assert b["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0.5, "resources": {}}


def test_our_policy_alone_decides_with_the_groups_targets_or_the_clusters() -> None:
    """Checked with Ray's own AutoscalingConfig."""
    wanted = config(
        {"name": "a", "experts": "0-3", "min_replicas": 0, "max_replicas": 4, "scaling": {"target_busy": 0.4}},
        {"name": "b", "experts": "4-7"},
        scaling={"target_busy": 0.8},
    )
    for application, bounds, busy in (("experts-a", (0, 4), 0.4), ("experts-b", (1, 1), 0.8)):
        made = applications(wanted)[application]["deployments"][0]["autoscaling_config"]
        scaling = AutoscalingConfig.model_validate(made)
        assert (scaling.min_replicas, scaling.max_replicas, scaling.initial_replicas) == (*bounds, None)
        assert scaling.upscale_delay_s == scaling.downscale_delay_s == scaling.downscale_to_zero_delay_s == 0
        assert scaling.get_upscaling_factor() == scaling.get_downscaling_factor() == 1
        assert scaling.metrics_interval_s == 1
        assert isinstance(scaling.policy.get_policy()(**scaling.policy.policy_kwargs), GroupPolicy)
        user_config = applications(wanted)[application]["deployments"][0]["user_config"]
        assert ScalingSection.model_validate(user_config["scaling"]) == ScalingSection(target_busy=busy)
        assert scaling.policy.policy_kwargs["directory"] == "127.0.0.1:9000"


def test_an_emulated_device_is_an_argument_of_its_group() -> None:
    device = {"teraflops": 1.0, "memory_gb_per_s": 100.0, "overhead_us": 5.0}
    made = applications(config({"name": "a", "experts": "0-7", "emulated": device}))
    assert GroupArgs.model_validate(made["experts-a"]["args"]).emulated == EmulatedDevice.model_validate(device)


@pytest.mark.parametrize("group", ["a", "b"])
def test_changed_bounds_and_targets_restart_nothing(group: str) -> None:
    change = {"max_replicas": 7, "scaling": {"target_busy": 0.3}}
    groups = [one.model_dump() | (change if one.name == group else {}) for one in SCALED.groups]
    assert changed_in_place({"groups": groups}) == {f"experts-{group}"}


def test_changed_bounds_of_the_router_restart_nothing() -> None:
    assert changed_in_place({"engine": {"max_replicas": 3}}) == {"router"}


def changed_in_place(change: dict[str, Any]) -> set[str]:
    """Applications that differ, none of them in what Ray restarts replicas for."""
    before, after = applications(SCALED), applications(ClusterConfig.model_validate(SCALED.model_dump() | change))
    for name, one in before.items():
        versions = [get_app_code_version(ServeApplicationSchema.model_validate(x)) for x in (one, after[name])]
        assert versions[0] == versions[1], name
    return {name for name, one in before.items() if one != after[name]}


TLS = {"ca": "/tls/ca.pem", "certificate": "/tls/tls.crt", "key": "/tls/tls.key", "server_name": "experts"}


def test_all_get_the_tls_files_and_ask_the_directory_at_the_port_that_wants_them() -> None:
    made = applications(config(security={"tls": TLS}, server={"grpc_tls_port": 9555}))
    group, router = made["experts-a"]["args"], made["router"]["args"]
    (deployment,) = made["experts-a"]["deployments"]
    policy = deployment["autoscaling_config"]["policy"]["policy_kwargs"]
    assert group["tls"] == router["tls"] == policy["tls"] == TLS
    assert group["directory"] == router["directory"] == policy["directory"] == "127.0.0.1:9555"
    assert made["directory"]["args"] == {"require_certificate": True}
    assert GroupArgs.model_validate(group).tls == RouterArgs.model_validate(router).tls
    assert GroupPolicy(**policy)


def test_without_tls_the_directory_asks_for_nothing() -> None:
    made = applications(config(server={"grpc_port": 9444, "grpc_tls_port": 9555}))
    assert made["directory"]["args"] == {}
    (deployment,) = made["experts-a"]["deployments"]
    policy = deployment["autoscaling_config"]["policy"]["policy_kwargs"]
    assert policy == {"group": "a", "directory": "127.0.0.1:9444"}
    assert made["experts-a"]["args"]["directory"] == made["router"]["args"]["directory"] == "127.0.0.1:9444"
