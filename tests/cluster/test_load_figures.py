"""What a running cluster says of its load: over HTTP, to Prometheus, on the command line. As of Ray 2.60."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from session_cluster import GROUPS, Cluster

from expert_service.metrics import REPLICA_METRICS
from expertmesh.args import experts_application
from expertmesh.cluster.record import Record
from expertmesh.directory import app as directory_app
from expertmesh.directory.client import expert_load, list_table
from expertmesh.directory.metrics import DIRECTORY_METRICS
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import directory_pb2_grpc
from loadtest.sampling import ray_pages
from router_service.metrics import SUSPENDED_REPLICAS, SUSPENSIONS_TOTAL

pytestmark = pytest.mark.cluster
PATIENCE_S = 120.0
SECOND, PREFIX = "second-directory", "/-/second-directory"


class SecondDirectory:
    """Beside the cluster's, so that what is told to it changes nothing for other tests."""

    def __init__(self, cluster: Cluster) -> None:
        self.health_url = f"{cluster.http}{PREFIX}/healthz"
        self._channel = grpc.insecure_channel(cluster.directory)
        self._stub = directory_pb2_grpc.DirectoryServiceStub(self._channel)

    def call(self, name: str, request: Any) -> Any:
        return getattr(self._stub, name)(request, metadata=(("application", SECOND),), timeout=60)

    def health(self) -> httpx.Response:
        return httpx.get(self.health_url, trust_env=False, timeout=60)


@pytest.fixture(scope="module")
def second(ray_cluster: Cluster) -> Iterator[SecondDirectory]:
    from ray import serve

    serve.run(directory_app.build({}), name=SECOND, route_prefix=PREFIX)
    yield SecondDirectory(ray_cluster)
    serve.delete(SECOND)


def generate(cluster: Cluster) -> None:
    done = cluster.run("generate", "--max-tokens", "8", "--temperature", "0", "def f(x):")
    assert done.returncode == 0, done.stderr


def test_expert_rows_come_from_the_directory(cluster: Cluster) -> None:
    generate(cluster)
    deadline = time.monotonic() + PATIENCE_S
    while len((reply := expert_load(cluster.directory, 60)).balance) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert [layer.layer for layer in reply.layers] == [0, 1, 2, 3]
    assert all(list(layer.experts) == list(range(16)) and sum(layer.rows) > 0 for layer in reply.layers)
    assert {one.layer: 0 < one.balancedness <= 1 for one in reply.balance} == dict.fromkeys(range(4), True)


def test_top_shows_groups_hot_experts_and_layers(cluster: Cluster) -> None:
    found = json.loads(cluster.run("top", "--json", "--window", "300").stdout)
    assert [group["name"] for group in found["cluster"]["groups"]] == list(GROUPS)
    assert len(found["experts"]) == 10 and found["experts"][0]["rows_per_s"] >= found["experts"][-1]["rows_per_s"] > 0
    assert {one["layer"] for one in found["layers"]} == {0, 1, 2, 3}
    people = cluster.run("top", "--once")
    assert people.returncode == 0 and "hottest experts" in people.stdout and "least even layers" in people.stdout


def test_health_names_whose_autoscaler_stalls(cluster: Cluster, second: SecondDirectory) -> None:
    assert (found := second.health()).status_code == 200 and found.json()["status"] == "ok"
    assert httpx.get(second.health_url + "/other", trust_env=False, timeout=60).status_code == 404
    for group in ("a", "removed"):
        second.call("ReportDecision", pb.ScalingDecision(group=group, target=1, max_replicas=2, reason="calm"))
    assert [one.last.reason for one in second.call("Scaling", pb.ScalingRequest()).groups] == ["calm"] * 2
    deadline = time.monotonic() + PATIENCE_S
    while (found := second.health()).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert found.status_code == 503
    assert found.json()["stalled"] == ["a"] and set(found.json()["groups"]) == {"a"}, "the other one does not exist"


def test_what_is_of_no_use_is_refused(second: SecondDirectory) -> None:
    for name, request in [("ReportDecision", pb.ScalingDecision()), ("ExpertLoad", pb.ExpertLoadRequest(window_s=-1))]:
        with pytest.raises(grpc.RpcError) as refused:
            second.call(name, request)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_an_application_without_a_replica_is_woken(second: SecondDirectory) -> None:
    from ray import serve

    class Sleepy:
        async def wake(self) -> None:
            return

    name = experts_application("sleepy")
    bounds = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1}
    deployment = serve.deployment(autoscaling_config=bounds, ray_actor_options={"num_cpus": 0})(Sleepy)
    serve.run(deployment.bind(), name=name, route_prefix=None)
    try:
        wanted = pb.WantRequest(layer=99, experts=[1])
        assert list(second.call("Want", wanted).groups) == ["sleepy"], "of those that this directory does not know"
        deadline = time.monotonic() + PATIENCE_S
        while not serve.status().applications[name].deployments["Sleepy"].replica_states.get("RUNNING"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        serve.delete(name)


def test_prometheus_gets_every_metric(cluster: Cluster, second: SecondDirectory) -> None:
    with ThreadPoolExecutor(1) as pool:
        corrupt = pool.submit(cluster.run, "fault", "corrupt", "b", "--for", "8", "--what", "nan")
        while not corrupt.done():
            generate(cluster)
    assert corrupt.result().returncode == 0, corrupt.result().stderr
    second.call("ReportDecision", pb.ScalingDecision(group="a", target=1))
    path = Path(cluster.environment["XDG_STATE_HOME"]) / "expertmesh" / "tests" / "cluster.json"
    pages = ray_pages(Record.model_validate_json(path.read_bytes()))
    wanted = {
        f"ray_{one.name}" for one in (*REPLICA_METRICS, SUSPENDED_REPLICAS, SUSPENSIONS_TOTAL, *DIRECTORY_METRICS)
    }
    deadline, lines = time.monotonic() + PATIENCE_S, [""]
    with httpx.Client(timeout=10, trust_env=False) as client:
        while missing := wanted - {line.partition("{")[0] for line in lines}:
            assert time.monotonic() < deadline, missing
            time.sleep(1)
            lines = [line for page in pages for line in client.get(f"http://{page}/metrics").text.splitlines()]
    suspensions = [line for line in lines if line.startswith("ray_expertmesh_router_suspensions_total{")]
    (of_nan,) = (line for line in suspensions if 'reason="not_finite"' in line)  # a slow machine adds others
    assert 'group="b"' in of_nan and float(of_nan.split()[-1]) >= 1
    waits = [line for line in lines if line.startswith("ray_expertmesh_replica_queue_wait_seconds{")]
    for replica in list_table(cluster.directory).replicas:
        assert sum(f'replica="{replica.replica_id}"' in line for line in waits) == 2
