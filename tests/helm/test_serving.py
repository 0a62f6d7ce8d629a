"""The Serve config that Helm renders of the CPU values, on a real local Ray: it answers, and scales in place."""

from __future__ import annotations

import base64
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from expertmesh.cluster import local_ray, processes
from expertmesh.cluster.local_ray import free_ports
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.directory import secure_port
from tools.chart.helm import CHART, objects, template

pytestmark = [pytest.mark.kubernetes, pytest.mark.vllm]

CPU = CHART / "ci" / "cpu-values.yaml"
MOUNTED = "/etc/expertmesh"
READY_S = 400.0
LOAD_STREAMS = 2


@dataclass
class Deployed:
    """A local Ray that runs what the chart renders, where pods would have an address each and Secrets be mounted."""

    api: ServeApi
    folder: Path
    settings: dict[str, str]
    http: str
    grpc: str
    directory: str
    key: str = ""

    def render(self, more: Mapping[str, str]) -> list[dict[str, Any]]:
        return objects(template(CPU, settings=self.settings | dict(more)))

    def mount(self) -> None:
        """Writes what the Secrets hold to where pods would find it."""
        for one in (one for one in self.render({}) if one["kind"] == "Secret"):
            held = {name: base64.b64decode(text) for name, text in one["data"].items()}
            kind = one["metadata"]["name"].removeprefix("demo-expertmesh-")
            (self.folder / kind).mkdir(exist_ok=True)
            for name, content in held.items():
                (self.folder / kind / name).write_bytes(content)
            self.key = held.get("api-key", b"").decode() or self.key

    def deploy(self, **more: str) -> None:
        """Hands the rendered Serve config to Ray and waits until it runs."""
        (service,) = (one for one in self.render(more) if one["kind"] == "RayService")
        text = service["spec"]["serveConfigV2"].replace(MOUNTED, str(self.folder))
        config = yaml.safe_load(text.replace("host: auto", "host: 127.0.0.1").replace("0.0.0.0", "127.0.0.1"))
        self.api.deploy(config)
        wanted = {one["name"] for one in config["applications"]}
        deadline = time.monotonic() + READY_S
        while True:
            found = self.api.details()["applications"]
            status = {name: one["status"] for name, one in found.items()}
            if set(status) == wanted and set(status.values()) == {"RUNNING"}:
                return
            failed = [f"{name}: {one['message']}" for name, one in found.items() if one["status"] == "DEPLOY_FAILED"]
            assert not failed, failed
            assert time.monotonic() < deadline, status
            time.sleep(0.5)

    def pids(self) -> dict[str, set[int]]:
        """Application -> processes of its replicas that run."""
        return {
            name: {
                replica["pid"]
                for deployment in one["deployments"].values()
                for replica in deployment["replicas"]
                if replica["state"] == "RUNNING"
            }
            for name, one in self.api.details()["applications"].items()
        }

    def bounds(self, group: str) -> tuple[int, int]:
        found = self.api.details()["applications"][f"experts-{group}"]["deployments"]["ExpertReplica"]
        scaling = found["deployment_config"]["autoscaling_config"]
        return scaling["min_replicas"], scaling["max_replicas"]

    def post(self, key: str | None = None) -> httpx.Response:
        key = self.key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        body = {"model": "demo", "prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0}
        return httpx.post(f"{self.http}/v1/completions", json=body, headers=headers, timeout=120, trust_env=False)


@dataclass
class Load:
    """Completions one after the other on some threads, until it is stopped."""

    target: Deployed
    texts: set[str] = field(default_factory=set)
    answers: int = 0
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(LOAD_STREAMS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self.target.post()
                answer.raise_for_status()
                self.texts.add(answer.json()["choices"][0]["text"])
                self.answers += 1
            except httpx.HTTPError as error:
                self.failures.append(repr(error))

    def go_on(self, answers: int) -> None:
        """Returns once so many more answers have come."""
        wanted = self.answers + answers
        while self.answers < wanted and not self.failures:
            time.sleep(0.1)


@pytest.fixture(scope="module")
def deployed(demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("mounted")
    http_port, grpc_port, grpc_tls_port = free_ports(3)
    settings = {
        "model.mountPath": str(demo_artifact.parent),
        "model.prepare.enabled": "false",
        "cluster.model.artifact": str(demo_artifact),
        "cluster.server.http_port": str(http_port),
        "cluster.server.grpc_port": str(grpc_port),
        "cluster.server.grpc_tls_port": str(grpc_tls_port),
        "cluster.server.replica_ports": "{61000,61999}",  # above those that systems hand out
    }
    (service,) = (one for one in objects(template(CPU, settings=settings)) if one["kind"] == "RayService")
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    told = {one["name"]: one["value"].replace(MOUNTED, str(folder)) for one in head["env"]}
    variables = {secure_port.VARIABLE: told[secure_port.VARIABLE]}
    ray = local_ray.start(24, folder / "ray.log", {"router": 1000, "experts": 1000}, variables)
    try:
        local_ray.wait_until_up(ray, 90, lambda: None)
        api = ServeApi(ray.dashboard, ray.token)
        addresses = [f"127.0.0.1:{port}" for port in (http_port, grpc_port, grpc_tls_port)]
        made = Deployed(api, folder, settings, f"http://{addresses[0]}", *addresses[1:])
        made.mount()
        made.deploy()
        yield made
    finally:
        processes.end(ray.marker, 15)


@pytest.mark.timeout(900)
def test_what_helm_test_runs(deployed: Deployed) -> None:
    """The arguments are those of the chart's test pod, with addresses of this machine."""
    (pod,) = (one for one in deployed.render({}) if one["kind"] == "Pod")
    (container,) = pod["spec"]["containers"]
    here = {
        "--url": deployed.http,
        "--grpc": deployed.grpc,
        "--directory": deployed.directory,
        "--tls": str(deployed.folder / "tls"),
    }
    arguments = [f"{name}={here[name]}" if (name := one.split("=")[0]) in here else one for one in container["args"]]
    environment = {"OPENAI_API_KEY": deployed.key, "PATH": ""}
    command = [sys.executable, *container["command"][1:], *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["gRPC health check", "directory", "completion"]
    assert "4 replicas of 4 groups" in done.stdout
    assert [deployed.post(key).status_code for key in ("", "em-" + "x" * 43, deployed.key)] == [401, 401, 200]


@pytest.mark.timeout(900)
def test_one_line_of_values_scales_one_group(deployed: Deployed) -> None:
    """Nothing restarts, nobody else's bounds change and no request fails; so it is when a group is appended."""
    before = deployed.pids()
    bounds = {group: deployed.bounds(group) for group in "abcd"}
    with Load(deployed) as load:
        load.go_on(8)
        deployed.deploy(**{"cluster.groups[0].min_replicas": "2"})
        load.go_on(8)
        scaled = deployed.pids()
        assert {group: deployed.bounds(group) for group in "abcd"} == bounds | {"a": (2, 2)}
        assert len(scaled["experts-a"]) == 2
        assert before["experts-a"] < scaled["experts-a"]
        assert others(before) == others(scaled)

        hot = "cluster.groups[4]"
        more = {f"{hot}.name": "hot", f"{hot}.experts": "0\\,5", f"{hot}.resources.experts": "1"}
        deployed.deploy(**{"cluster.groups[0].min_replicas": "2"}, **more)
        load.go_on(8)
        appended = deployed.pids()
        assert len(appended.pop("experts-hot")) == 1
        assert appended == scaled
    assert load.failures == []
    assert len(load.texts) == 1, "who serves an expert changes no answer"


def others(pids: Mapping[str, set[int]]) -> dict[str, set[int]]:
    return {name: found for name, found in pids.items() if name != "experts-a"}
