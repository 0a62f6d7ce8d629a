"""A cluster config as Ray Serve's own config: one application per group, the directory and the router."""

from __future__ import annotations

import math
from typing import Any

from expertmesh.args import (
    DIRECTORY_APPLICATION,
    DIRECTORY_DEPLOYMENT,
    DIRECTORY_ROUTE_PREFIX,
    EXPERTS_DEPLOYMENT,
    ROUTER_APPLICATION,
    ROUTER_DEPLOYMENT,
    DirectoryArgs,
    GroupArgs,
    RouterArgs,
    experts_application,
)
from expertmesh.artifact.manifest import Manifest
from expertmesh.config import ClusterConfig, GroupSection

SERVICER_FUNCTION = "expertmesh.directory.secure_port.add_directory"
BOUNDS = {"min_replicas", "max_replicas"}
POLICY = "expertmesh.scaling.serve_policy:GroupPolicy"
FOLLOW_THE_POLICY = {
    "upscale_delay_s": 0,
    "downscale_delay_s": 0,
    "downscale_to_zero_delay_s": 0,
    "upscaling_factor": 1,
    "downscaling_factor": 1,
    "look_back_period_s": 5,
    "metrics_interval_s": 1,
}
"""Delays and factors are the policy's. Replicas report every second: Ray 2.60 calls the key deprecated in favour of an
environment variable that it does not read yet."""


def serve_config(config: ClusterConfig, manifest: Manifest) -> dict[str, Any]:
    """The body that Ray Serve's REST API takes (ServeDeploySchema), as JSON values.

    Bounds and resources stand under `deployments`, not in an application's args, whose change would restart it. Raises
    ConfigError where a group names an expert that does not exist.
    """
    server = config.server
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": server.host, "port": server.http_port},
        "grpc_options": {"port": server.grpc_port, "grpc_servicer_functions": [SERVICER_FUNCTION]},
        "applications": [
            _directory_application(config),
            *(_group_application(config, group, manifest) for group in config.groups),
            _router_application(config, manifest),
        ],
    }


def directory_address(config: ClusterConfig) -> str:
    """Serve's gRPC proxy runs on every node, so a replica or router asks its own."""
    return f"127.0.0.1:{directory_port(config)}"


def directory_port(config: ClusterConfig) -> int:
    return config.server.grpc_tls_port if config.security.tls else config.server.grpc_port


def model_name(config: ClusterConfig, manifest: Manifest) -> str:
    return config.model.name or manifest.name


def _application(name: str, import_path: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "import_path": import_path, "route_prefix": None, "args": args}


def _directory_application(config: ClusterConfig) -> dict[str, Any]:
    args = DirectoryArgs(require_certificate=config.security.tls is not None).model_dump(exclude_defaults=True)
    application = _application(DIRECTORY_APPLICATION, "expertmesh.directory.app:build", args)
    # it takes next to no CPU, and a replica of 0 CPUs may land on any node, so that resources alone say where
    options = {"num_cpus": 0, "resources": config.directory.resources}
    deployment = {"name": DIRECTORY_DEPLOYMENT, "ray_actor_options": options}
    return application | {"route_prefix": DIRECTORY_ROUTE_PREFIX, "deployments": [deployment]}


def _group_application(config: ClusterConfig, group: GroupSection, manifest: Manifest) -> dict[str, Any]:
    group.expert_sets(manifest)  # raises where an expert does not exist
    args = GroupArgs(
        artifact=str(config.model.artifact),
        group=group.name,
        experts=group.experts,
        num_threads=max(1, math.floor(group.num_cpus)),
        device="cuda" if group.num_gpus else "cpu",
        host=config.server.replica_host,
        ports=config.server.replica_ports,
        directory=directory_address(config),
        lease_ms=config.directory.lease_ms,
        max_queued_rows=group.max_queued_rows,
        emulated=group.emulated,
        tls=config.security.tls,
    )
    dumped = args.model_dump(mode="json")
    resources = {"num_cpus": group.num_cpus, "num_gpus": group.num_gpus, "resources": group.resources}
    deployment = {
        "name": EXPERTS_DEPLOYMENT,
        "autoscaling_config": autoscaling_config(config, group),
        "user_config": {"scaling": (group.scaling or config.scaling).model_dump(mode="json")},
        "ray_actor_options": resources,
    }
    application = _application(experts_application(group.name), "expert_service.app:build", dumped)
    return application | {"deployments": [deployment]}


def _router_application(config: ClusterConfig, manifest: Manifest) -> dict[str, Any]:
    args = RouterArgs(
        artifact=str(config.model.artifact),
        name=model_name(config, manifest),
        engine=config.engine,
        directory=directory_address(config),
        tls=config.security.tls,
        api_keys=str(config.security.api_keys) if config.security.api_keys else None,
    )
    dumped = args.model_dump(mode="json", exclude={"engine": BOUNDS})
    application = _application(ROUTER_APPLICATION, "router_service.app:build", dumped)
    # also where both are the same: `num_replicas` in its place would restart routers once they differ
    bounds = {"min_replicas": config.engine.min_replicas, "max_replicas": config.engine.max_replicas}
    deployment = {"name": ROUTER_DEPLOYMENT, "autoscaling_config": bounds}
    return application | {"route_prefix": "/", "deployments": [deployment]}


def autoscaling_config(config: ClusterConfig, group: GroupSection) -> dict[str, Any]:
    """Ray Serve's AutoscalingConfig by which our policy alone decides.

    Also where both bounds are the same: a replica that began without one would stay silent once the bounds differ. No
    `initial_replicas`, to which Serve would jump after every change. The targets stand in `user_config`: Serve restarts
    all replicas of an application whose policy changes, its arguments included.
    """
    kwargs: dict[str, Any] = {"group": group.name, "directory": directory_address(config)}
    if config.security.tls is not None:
        kwargs["tls"] = config.security.tls.model_dump(mode="json")
    return {
        "min_replicas": group.min_replicas,
        "max_replicas": group.max_replicas,
        "policy": {"policy_function": POLICY, "policy_kwargs": kwargs},
        **FOLLOW_THE_POLICY,
    }
