"""An expert tier on a local Ray: the directory and groups of replicas with emulated devices, no router. Used by
`hot_experts`; its Ray alone by `dispatch`."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmesh.args import DIRECTORY_APPLICATION, ROUTER_APPLICATION, experts_application
from expertmesh.artifact.manifest import Manifest, read_manifest
from expertmesh.artifact.prepare import prepare
from expertmesh.cluster import local_ray, processes
from expertmesh.cluster.readiness import steps
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.config import ClusterConfig
from expertmesh.deployment import directory_address, serve_config
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "examples" / "demo_model" / "checkpoint"
RAY_START_S = 90.0
READY_S = 180.0
GRACE_S = 10.0
HELD = ("STARTING", "UPDATING", "RECOVERING", "RUNNING", "STOPPING", "PENDING_MIGRATION")
"""States of Ray Serve's replicas in which they hold their device."""


def say(text: str) -> None:
    print(f"hot_experts: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Tier:
    api: ServeApi
    manifest: Manifest
    folder: Path
    """Of its own; gone with it."""
    artifact: Path
    ports: tuple[int, int]
    ray: local_ray.LocalRay

    def configure(self, **described: Any) -> ClusterConfig:
        """A config of this tier; `described` are its groups, scaling, …"""
        http_port, grpc_port = self.ports
        server = {"http_port": http_port, "grpc_port": grpc_port}
        return ClusterConfig.model_validate({"model": {"artifact": str(self.artifact)}, "server": server} | described)

    def deploy(self, config: ClusterConfig, policy: str, **kwargs: str) -> None:
        """Applies it with this policy function, whose arguments are GroupPolicy's and `kwargs`, and waits until every
        group is ready."""
        made = serve_config(config, self.manifest)
        made["applications"] = [one for one in made["applications"] if one["name"] != ROUTER_APPLICATION]
        for application in made["applications"]:
            for deployment in application.get("deployments", ()):
                if "autoscaling_config" in deployment:
                    chosen = deployment["autoscaling_config"]["policy"]
                    chosen["policy_function"], chosen["policy_kwargs"] = policy, chosen["policy_kwargs"] | kwargs
        self.api.deploy(made)
        self._wait(config)

    def _wait(self, config: ClusterConfig) -> None:
        waited_for: dict[str, str | None] = {DIRECTORY_APPLICATION: None}
        waited_for |= {experts_application(group.name): group.name for group in config.groups}
        deadline = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(ClusterError):
                reached = steps(waited_for, self.api.details(), list_table(directory_address(config), 2.0))
                if failed := next((one for one in reached if one.error), None):
                    raise ClusterError(f"application {failed.application}: {failed.error}")
                waiting = [one for one in reached if not one.done]
                if not waiting:
                    return
            if time.monotonic() > deadline:
                raise ClusterError(f"the tier is not ready within {READY_S:.0f} s")
            time.sleep(0.5)

    def states(self) -> dict[str, list[str]]:
        """Group -> the state of each of its replicas that holds a device: that starts, runs or stops."""
        applications = self.api.details().get("applications", {})
        prefix = experts_application("")
        return {
            name.removeprefix(prefix): [
                replica["state"]
                for deployment in application.get("deployments", {}).values()
                for replica in deployment.get("replicas", ())
                if replica["state"] in HELD
            ]
            for name, application in applications.items()
            if name.startswith(prefix)
        }


@contextlib.contextmanager
def own_ray(num_cpus: int, folder: Path) -> Iterator[local_ray.LocalRay]:
    """A Ray of one node, which logs to `folder` and ends with the block."""
    ray = local_ray.start(num_cpus, folder / "ray.log")
    try:
        local_ray.wait_until_up(ray, RAY_START_S, lambda: None)
        yield ray
    finally:
        processes.end(ray.marker, GRACE_S)


@contextlib.contextmanager
def running_tier(num_cpus: int) -> Iterator[Tier]:
    """Ray of our own with so many logical CPUs, and the demo model's artifact; all ends with the block."""
    with tempfile.TemporaryDirectory(prefix="expertmesh-") as folder:
        artifact = Path(folder) / "demo.artifact"
        prepare(CHECKPOINT, artifact)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with own_ray(num_cpus, Path(folder)) as ray:
            http_port, grpc_port = local_ray.free_ports(2)
            api = ServeApi(ray.dashboard, ray.token)
            yield Tier(api, read_manifest(artifact), Path(folder), artifact, (http_port, grpc_port), ray)
