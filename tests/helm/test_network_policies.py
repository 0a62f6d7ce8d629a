"""Who may talk to whom, worked out from the policies as Kubernetes does: both ends must allow a connection."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from tools.chart.helm import CHART, helm, objects, template

CPU = CHART / "ci" / "cpu-values.yaml"
OURS = {"app.kubernetes.io/instance": "demo", "app.kubernetes.io/part-of": "expertmesh"}
ROLES = ("head", "router", "experts", "test", "rebalancer", "prepare")
NAMESPACES = {
    "default": {"kubernetes.io/metadata.name": "default"},
    "kuberay": {"kubernetes.io/metadata.name": "kuberay"},
    "kube-system": {"kubernetes.io/metadata.name": "kube-system"},
    "monitoring": {"kubernetes.io/metadata.name": "monitoring"},
}
PODS = {
    **{role: ("default", OURS | {"app.kubernetes.io/component": role}) for role in ROLES},
    "neighbour": ("default", {"app": "other"}),
    "operator": ("kuberay", {"app.kubernetes.io/name": "kuberay-operator"}),
    "impostor": ("default", {"app.kubernetes.io/name": "kuberay"}),
    "prometheus": ("monitoring", {"app": "prometheus"}),
    "dns": ("kube-system", {"k8s-app": "kube-dns"}),
}
ADDRESSES = {"api server": "10.0.0.1", "internet": "93.184.216.34"}
"""Peers that are no pods."""
RAY = (6379, 8265, 52365, 52366, 52367, 52368, 52369, 10002, 19999)
DATA = (50051, 50114)
Policies = list[dict[str, Any]]


@pytest.fixture(scope="module")
def policies() -> Policies:
    settings = {
        "rebalancer.enabled": "true",
        "monitoring.podMonitor.enabled": "true",
        "networkPolicy.monitoringNamespaceLabels.kubernetes\\.io/metadata\\.name": "monitoring",
        "model.prepare.source": "s3://bucket/model",
    }
    return [one["spec"] for one in objects(template(CPU, settings=settings)) if one["kind"] == "NetworkPolicy"]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for one in selector.get("matchExpressions", ()):
        assert one["operator"] == "In"
        if labels.get(one["key"]) not in one["values"]:
            return False
    return True


def is_peer(peer: dict[str, Any], other: str) -> bool:
    if "ipBlock" in peer:
        # pods have addresses too, which the blocks of the tests' values hold
        address = ADDRESSES.get(other, "10.244.0.9")
        return ipaddress.ip_address(address) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
    if other in ADDRESSES:
        return False
    namespace, labels = PODS[other]
    if "namespaceSelector" in peer:
        within = selects(peer["namespaceSelector"], NAMESPACES[namespace])
    else:
        within = namespace == "default"
    return within and selects(peer.get("podSelector", {}), labels)


def opens(rule: dict[str, Any], side: str, other: str, port: int, protocol: str) -> bool:
    peers = rule.get(side)
    if peers is not None and not any(is_peer(peer, other) for peer in peers):
        return False
    ports = rule.get("ports")
    return ports is None or any(
        one.get("protocol", "TCP") == protocol and one["port"] <= port <= one.get("endPort", one["port"])
        for one in ports
    )


def one_way(policies: Policies, pod: str, other: str, port: int, protocol: str, direction: str) -> bool:
    """Whether policies of one end let the connection through; a pod that none selects is open."""
    if pod in ADDRESSES or PODS[pod][0] != "default":
        return True
    chosen = [one for one in policies if direction in one["policyTypes"] and selects(one["podSelector"], PODS[pod][1])]
    key, side = {"Ingress": ("ingress", "from"), "Egress": ("egress", "to")}[direction]
    return not chosen or any(opens(rule, side, other, port, protocol) for one in chosen for rule in one.get(key, ()))


def may(policies: Policies, source: str, target: str, port: int, protocol: str = "TCP") -> bool:
    return one_way(policies, source, target, port, protocol, "Egress") and one_way(
        policies, target, source, port, protocol, "Ingress"
    )


def test_the_data_plane_is_from_router_to_expert_alone(policies: Policies) -> None:
    for port in DATA:
        allowed = {(a, b) for a in PODS for b in ROLES if a != b and may(policies, a, b, port)}
        assert allowed == {("router", "experts")}
        assert not may(policies, "experts", "experts", port)
        assert not any(may(policies, "internet", role, port) for role in ROLES)


def test_only_the_api_is_open(policies: Policies) -> None:
    for stranger in ("neighbour", "internet", "impostor"):
        found = {
            (role, port)
            for role in ROLES
            for port in (8000, 9000, 9001, 8080, 44217, *RAY, *DATA)
            if may(policies, stranger, role, port)
        }
        assert found == {("router", 8000), ("experts", 8000)}


def test_ray_talks_to_itself(policies: Policies) -> None:
    ray = ("head", "router", "experts")
    assert all(may(policies, a, b, port) for a in ray for b in ray for port in RAY)
    for other in ("test", "prepare", "prometheus"):
        assert not any(may(policies, other, role, port) for role in ray for port in RAY)


def test_what_each_needs(policies: Policies) -> None:
    assert all(may(policies, role, "dns", 53, protocol) for role in ROLES for protocol in ("TCP", "UDP"))
    assert [role for role in ROLES if may(policies, role, "api server", 443)] == ["head", "rebalancer", "prepare"]
    assert [role for role in ROLES if may(policies, role, "internet", 8443)] == ["prepare"]
    assert [role for role in ROLES if may(policies, "operator", role, 8265)] == ["head"]
    assert all(may(policies, "operator", "head", port) for port in (8265, 52365, 8000))
    assert [role for role in ROLES if may(policies, "prometheus", role, 8080)] == ["head", "router", "experts"]
    assert [role for role in ROLES if may(policies, "prometheus", role, 44217)] == ["head"]
    assert all(may(policies, "test", role, port) for role in ("router", "experts") for port in (8000, 9000, 9001))
    assert [role for role in ROLES if may(policies, "rebalancer", role, 9001)] == ["router", "experts"]
    assert not any(may(policies, "rebalancer", role, 9000) for role in ROLES), "TLS is on"
    assert not any(may(policies, "rebalancer", role, 8265) for role in ROLES)


def test_without_tls_the_directory_is_at_the_plain_port() -> None:
    rendered = objects(template(CPU, settings={"rebalancer.enabled": "true", "tls.mode": "off"}))
    opened = [one["spec"] for one in rendered if one["kind"] == "NetworkPolicy"]
    for source in ("test", "rebalancer"):
        assert [role for role in ROLES if may(opened, source, role, 9000)] == ["router", "experts"]
        assert not any(may(opened, source, role, 9001) for role in ROLES)


def test_redis_is_for_the_head_alone(policies: Policies) -> None:
    settings = {
        "ray.gcsFaultTolerance.redisAddress": "redis.example:7000",
        "networkPolicy.redisNetworks": "{93.0.0.0/8}",
    }
    rendered = objects(template(CPU, settings=settings))
    opened = [one["spec"] for one in rendered if one["kind"] == "NetworkPolicy"]
    assert [role for role in ROLES if may(opened, role, "internet", 7000)] == ["head"]
    assert not any(may(opened, role, "api server", 7000) for role in ROLES)
    assert not may(policies, "head", "internet", 7000)


def test_clients_can_be_named() -> None:
    peer = "networkPolicy.clients[0].namespaceSelector.matchLabels.kubernetes\\.io/metadata\\.name"
    rendered = objects(template(CPU, settings={peer: "monitoring"}))
    policies = [one["spec"] for one in rendered if one["kind"] == "NetworkPolicy"]
    assert may(policies, "prometheus", "router", 8000)
    assert may(policies, "test", "router", 8000)
    assert not may(policies, "neighbour", "router", 8000)
    assert not may(policies, "internet", "router", 8000)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((), True),
        (("networkPolicy.operator.namespaceLabels.team=ray",), False),
        (("networkPolicy.enabled=false",), False),
    ],
)
def test_the_notes_say_that_an_operator_may_be_anywhere(settings: tuple[str, ...], said: bool) -> None:
    given = [word for setting in ("ray.requireKubeRay=false", *settings) for word in ("--set", setting)]
    example = CHART / "examples" / "demo-cpu.yaml"
    text = helm("install", "demo", str(CHART), "-f", str(example), "--dry-run=client", *given)
    notes = text.partition("NOTES:")[2]
    assert "Test it:" in notes
    assert ("networkPolicy.operator.namespaceLabels is empty: a pod of any namespace" in notes) == said


def test_name_servers_can_be_anywhere() -> None:
    rendered = objects(template(CPU, settings={"networkPolicy.dnsNamespaceLabels": "null"}))
    policies = [one["spec"] for one in rendered if one["kind"] == "NetworkPolicy"]
    assert may(policies, "router", "internet", 53, "UDP")
    assert not may(policies, "router", "internet", 443)


def test_every_port_of_ray_is_fixed() -> None:
    """What `ray start` is told is what policies open."""
    (service,) = (one for one in objects(template(CPU)) if one["kind"] == "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        told = {int(value) for key, value in group["rayStartParams"].items() if key.endswith("port")}
        assert {52365, 52366, 52367, 52368, 52369, 8080, 10002, 19999} <= told
    head = cluster["headGroupSpec"]["rayStartParams"]
    assert (head["port"], head["ray-client-server-port"]) == ("6379", "10001")


def test_budgets_let_pods_go_but_not_the_last() -> None:
    """Kubernetes takes a number alone where pods have no scale subresource."""
    settings = {"expertPools[0].minReplicas": "3", "router.minReplicas": "0"}
    rendered = objects(template(CPU, settings=settings))
    budgets = {
        one["spec"]["selector"]["matchLabels"]["ray.io/group"]: one["spec"]["minAvailable"]
        for one in rendered
        if one["kind"] == "PodDisruptionBudget"
    }
    assert budgets == {"headgroup": 1, "router": 0, "experts": 2}
    assert "minAvailable: 7" in template(CPU, settings={"expertPools[0].minAvailable": "7"})
