"""How Kubernetes sees that a pod lives, when it may be asked, and how long it may take to end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_serve_config import pods_of

from tools.chart.helm import objects, template, values_files

LIVES = {"initialDelaySeconds": 30, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 60}
"""Ten minutes of a raylet that does not answer, as long as a worker waits for a head."""
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
files = pytest.mark.parametrize("file", values_files(), ids=lambda file: file.stem)


class RayPods:
    """Of a rendered RayService: what `ray start` is told, and the one container, by the name of head or pool."""

    def __init__(self, file: Path, settings: Mapping[str, str]) -> None:
        self.objects = objects(template(file, settings=settings))
        (service,) = (one for one in self.objects if one["kind"] == "RayService")
        cluster = service["spec"]["rayClusterConfig"]
        self.http_port = yaml.safe_load(service["spec"]["serveConfigV2"])["http_options"]["port"]
        named = {"head": cluster["headGroupSpec"]} | {one["groupName"]: one for one in cluster["workerGroupSpecs"]}
        self.told = {name: one["rayStartParams"] for name, one in named.items()}
        self.containers: dict[str, dict[str, Any]] = {}
        for name, one in named.items():
            (self.containers[name],) = one["template"]["spec"]["containers"]

    def port(self, name: str, port: str) -> int:
        (found,) = (one["containerPort"] for one in self.containers[name]["ports"] if one["name"] == port)
        return int(found)


@files
@pytest.mark.parametrize("http_port", [8000, 8123])
def test_probes_of_ray_pods(file: Path, http_port: int) -> None:
    """Given for each, since KubeRay's own run a shell in the container; a name of a port is the one that listens."""
    made = RayPods(file, {"cluster.server.http_port": str(http_port)})
    assert {"head", "router"} < made.containers.keys()
    for name, container in made.containers.items():
        agent = int(made.told[name]["dashboard-agent-listen-port"])
        raylet = {"httpGet": {"path": "/api/local_raylet_healthz", "port": agent}}
        assert container["livenessProbe"] == raylet | LIVES, name
        assert "startupProbe" not in container
        ready = dict(container["readinessProbe"])
        if name == "head":
            assert ready.pop("httpGet") == {"path": "/api/gcs_healthz", "port": "dashboard"}
            assert made.port(name, "dashboard") == 8265, "Ray's own: it is not told another"
            assert "dashboard-port" not in made.told[name]
        else:
            # a pod without a replica has no Serve proxy, and gets no requests: one failure suffices
            assert ready.pop("httpGet") == {"path": "/-/healthz", "port": "serve"}, name
            assert made.port(name, "serve") == made.http_port == http_port
            assert ready["failureThreshold"] == 1
        assert ready["periodSeconds"] == ready["timeoutSeconds"] == 5


@files
def test_what_else_runs(file: Path) -> None:
    """The rebalancer listens nowhere, and is asked whether it gets on; the others run to an end."""
    made = RayPods(file, {"rebalancer.enabled": "true"})
    others = [one for one in made.objects if one["kind"] != "RayService"]
    found = {
        whose: [key for container in spec["containers"] for key in container if key.endswith("Probe")]
        for whose, spec in pods_of(others)
    }
    (rebalancer,) = (whose for whose in found if "rebalancer" in whose)
    assert found.pop(rebalancer) == ["livenessProbe"]
    assert found and not any(found.values())
    for _, spec in pods_of(made.objects):
        for container in spec.get("initContainers", ()):
            assert not [key for key in container if key.endswith("Probe")], "Kubernetes refuses one"


@files
@pytest.mark.parametrize(
    "seconds", [{}, {"preStopSeconds": 30, "drainSeconds": 300, "terminationGracePeriodSeconds": 331}]
)
def test_a_pod_may_end_in_its_own_time(file: Path, seconds: dict[str, int]) -> None:
    """It sleeps, its replicas drain, and only then the time is up, after which Kubernetes kills."""
    made = RayPods(file, {f"pods.{key}": str(value) for key, value in seconds.items()})
    sleeping = set()
    for whose, spec in pods_of(made.objects):
        for container in spec["containers"]:
            if "lifecycle" not in container:
                continue
            sleeping.add(whose)
            program, sleep = container["lifecycle"]["preStop"]["exec"]["command"]
            (drain,) = (float(one["value"]) for one in container["env"] if one["name"] == DRAIN)
            assert program == "sleep"
            assert spec["terminationGracePeriodSeconds"] > float(sleep) + drain, whose
            if seconds:
                assert (float(sleep), drain) == (seconds["preStopSeconds"], seconds["drainSeconds"])
    assert sleeping == set(made.containers), "all that hold replicas, and the head"


def test_ray_answers_what_is_asked() -> None:
    """Paths and the variable are Ray's own, and may change with it."""
    from ray._private import ray_constants
    from ray.dashboard.modules.reporter import healthz_agent, reporter_head
    from ray.serve._private import proxy_request_response

    for module, path in (
        (healthz_agent, "/api/local_raylet_healthz"),
        (reporter_head, "/api/gcs_healthz"),
        (proxy_request_response, "/-/healthz"),
        (ray_constants, DRAIN),
    ):
        assert f'"{path}"' in Path(str(module.__file__)).read_text(), path
