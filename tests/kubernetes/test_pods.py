"""Pods by role, their logs and the report, asked of a server that answers as Kubernetes' API does."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from kuberay_stand_in import CLUSTER
from kubernetes.client import ApiClient, Configuration
from pods_api import NAMESPACE, PodsApi, pod
from serve_configs import serve_text

from expertmesh.errors import ClusterError, ConfigError
from expertmesh.kubernetes.connection import Connection
from expertmesh.kubernetes.pods import Pods, chosen, merged, pool_of, role_of
from expertmesh.kubernetes.report import ABSENT, make_report
from expertmesh.kubernetes.service import ApplicationStatus, Service

SERVICE = Service(
    namespace=NAMESPACE,
    name="mesh",
    resource_version="1",
    generation=2,
    observed_generation=1,
    serve_config=serve_text(),
    conditions=(),
    applications=(ApplicationStatus(name="experts-hot", status="RUNNING", message=""),),
    active_cluster=CLUSTER,
    pending_cluster="",
    pools=("router", "experts"),
    endpoints=1,
)


@pytest.fixture
def api() -> Iterator[tuple[PodsApi, Pods]]:
    made = PodsApi()
    with made.serving() as url:
        yield made, Pods(Connection(ApiClient(Configuration(host=url)), NAMESPACE))


@pytest.mark.parametrize(
    ("labels", "role"),
    [
        ({"ray.io/node-type": "head", "ray.io/group": "router"}, "head"),
        ({"ray.io/node-type": "worker", "ray.io/group": "router"}, "router"),
        ({"ray.io/node-type": "worker", "ray.io/group": "h100"}, "experts"),
        ({"app.kubernetes.io/component": "router", "ray.io/group": "h100"}, "router"),
        ({}, "experts"),
    ],
)
def test_roles(labels: dict[str, str], role: str) -> None:
    assert role_of(labels) == role


def test_pods_are_those_of_the_clusters_in_order(api: tuple[PodsApi, Pods]) -> None:
    made, pods = api
    made.pods = [
        pod("e-2", "experts", ready=False),
        pod("r-1", "router", going=True),
        pod("e-1", "experts"),
        pod("h", ""),
    ]
    found = pods.of(SERVICE)
    assert [(one.name, one.role, one.pool) for one in found] == [
        ("h", "head", ""),
        ("r-1", "router", "router"),
        ("e-1", "experts", "experts"),
        ("e-2", "experts", "experts"),
    ]
    assert [one.ready for one in found] == [True, True, True, False]
    assert [one.phase for one in found] == ["Running", "Terminating", "Running", "Running"]
    assert {one.restarts for one in found} == {2} and found[0].containers == ("ray", "sidecar")
    pods.of(SERVICE.model_copy(update={"pending_cluster": "mesh-new"}))
    assert [query["labelSelector"] for _, query in made.asked] == [
        [f"ray.io/cluster in ({CLUSTER})"],
        [f"ray.io/cluster in ({CLUSTER},mesh-new)"],
    ]
    assert pods.of(SERVICE.model_copy(update={"active_cluster": ""})) == [], "nobody is asked"
    assert len(made.asked) == 2


def test_whose_logs(api: tuple[PodsApi, Pods]) -> None:
    made, pods = api
    made.pods = [pod("h", ""), pod("e-1", "experts"), pod("o-1", "others")]
    found = pods.of(SERVICE)
    assert [one.name for one in chosen(found, SERVICE, "experts", None)] == ["e-1", "o-1"]
    assert pool_of(SERVICE, "hot") == "experts"
    assert [one.name for one in chosen(found, SERVICE, "experts", "hot")] == ["e-1"]
    with pytest.raises(ConfigError, match="has no router pod now"):
        chosen(found, SERVICE, "router", None)
    with pytest.raises(ConfigError, match="no experts pod of pool experts, where group hot runs, now"):
        chosen(found[:1], SERVICE, "experts", "hot")
    with pytest.raises(ConfigError, match="no group 'hto'; the groups are "):
        chosen(found, SERVICE, "experts", "hto")


def test_lines_of_several_pods(api: tuple[PodsApi, Pods]) -> None:
    made, pods = api
    made.pods = [pod("e-1", "experts"), pod("e-2", "experts"), pod("e-3", "experts")]
    made.logs = {"e-1": "one\ntwo\n", "e-2": ""}
    found = pods.of(SERVICE)
    problems: list[str] = []
    sources = {one.name: pods.lines(one, follow=False, tail=7) for one in found}
    assert list(merged(sources, problems.append)) == [("e-1", "one"), ("e-1", "two")]
    (problem,) = problems
    assert "e-3" in problem and "\n" not in problem
    path, query = next(one for one in made.asked if one[0].endswith("/e-1/log"))
    assert path == "/api/v1/namespaces/test/pods/e-1/log"
    assert (query["container"], query["tailLines"], query["follow"]) == (["ray"], ["7"], ["false"])
    with pytest.raises(ClusterError, match="e-3"):
        list(merged({"e-3": pods.lines(found[2], follow=False, tail=None)}, problems.append))


def test_a_source_that_breaks_otherwise_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: told.set())

    def broken() -> Iterator[str]:
        yield "one"
        raise ValueError("not foreseen")

    problems: list[str] = []
    sources = {"a": broken(), "b": iter(["two"])}
    assert sorted(merged(sources, problems.append)) == [("a", "one"), ("b", "two")]
    assert problems == ["a: not read to its end"]
    assert told.wait(10), "as any exception of a thread"


def test_the_report(api: tuple[PodsApi, Pods]) -> None:
    made, pods = api
    made.pods = [pod("e-1", "experts")]
    report = make_report(SERVICE, pods.of(SERVICE), ["router", "experts-hot", "experts-cold"], {"hot": 2})
    assert not report.current
    assert {one.name: one.status for one in report.applications} == {
        "router": ABSENT,
        "experts-hot": "RUNNING",
        "experts-cold": ABSENT,
    }
    hot, cold = sorted(report.groups, key=lambda one: one.name, reverse=True)
    assert (hot.min_replicas, hot.max_replicas, hot.pool, hot.ready, hot.status) == (1, 2, "experts", 2, "RUNNING")
    assert (cold.ready, cold.status) == (0, ABSENT)
    assert [one.name for one in report.pods] == ["e-1"]
    unasked = make_report(SERVICE, [], [], None)
    assert {one.ready for one in unasked.groups} == {None}
