"""What is wrong in values is refused before anything is installed, and the message names the key."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_serve_config import merged

from tools.chart.helm import CHART, HelmError, helm, objects, template

CPU = CHART / "ci" / "cpu-values.yaml"
GPU = CHART / "ci" / "gpu-values.yaml"
FREE = ("nodeSelector", "labels", "Labels", "annotations", "Annotations", "kwargs", "experts", "matchLabels")
"""Maps whose keys are the user's."""


def objects_of(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all maps whose keys the schema knows."""
    if isinstance(node, dict):
        if not has_free_keys(path):
            yield path
        for key, child in node.items():
            yield from objects_of(child, (*path, key))
    elif isinstance(node, list):
        for number, child in enumerate(node):
            yield from objects_of(child, (*path, number))


def has_free_keys(path: tuple[str | int, ...]) -> bool:
    """Ray's custom resources, by which groups and engine name pools, are free too; a pod's resources are not."""
    names_pools = path[-1:] == ("resources",) and path[:1] == ("cluster",)
    return names_pools or bool(path and str(path[-1]).endswith(FREE))


def at(values: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def write(folder: Path, values: Mapping[str, Any]) -> Path:
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump(dict(values)))
    return file


ZONE = {"matchExpressions": [{"key": "zone", "operator": "NotIn", "values": ["a"]}]}
PREFERS = "preferredDuringSchedulingIgnoredDuringExecution"
PLACED = {
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    "affinity": {"nodeAffinity": {PREFERS: [{"weight": 1, "preference": ZONE}]}},
}
ROUTED = {"enabled": True, "parentRefs": [{"name": "public", "namespace": "gateways"}], "hostnames": ["*.example.com"]}
PREFERENCE = ("router", "affinity", "nodeAffinity", PREFERS, 0)
CLOSED = list(objects_of(merged(GPU)))


def test_a_typo_in_any_object_is_refused(tmp_path: Path) -> None:
    """One run of Helm with a foreign key in every object: each of them is named."""
    values = merged(GPU)
    for path in sorted(CLOSED, key=len, reverse=True):
        at(values, path)["typo"] = 1
    with pytest.raises(HelmError) as caught:
        template(write(tmp_path, values))
    said = str(caught.value)
    missing = [path for path in CLOSED if f"at '/{'/'.join(map(str, path))}'" not in said.replace("at ''", "at '/'")]
    assert missing == []
    assert len(CLOSED) > 70


WRONG: list[tuple[tuple[str | int, ...], object]] = [
    (("expertPool",), []),
    (("cluster", "groups", 0, "max_replica"), 3),
    (("cluster", "groups", 0, "min_replicas"), -1),
    (("cluster", "groups", 0, "name"), "Not_A_Name"),
    (("cluster", "groups", 0, "num_gpus"), "one"),
    (("cluster", "engine", "dtype"), "int8"),
    (("cluster", "scaling", "target_busy"), 1.5),
    (("cluster", "server", "http_port"), 70000),
    (("router", "gpu", "count"), 65),
    (("router", "affinity", "nodeAffinty"), {}),
    (("expertPools", 0, "minReplicas"), "two"),
    (("head", "resources", "requests", "memory"), "8 GB"),
    (("image", "digest"), "sha256:12"),
    (("tls", "mode"), "on"),
    (("model", "prepare", "source"), "models/relative"),
    (("networkPolicy", "apiServerNetworks", 0), "everywhere"),
    (("networkPolicy", "apiServerNetworks", 0), "10.0.0.1/99"),
    (("networkPolicy", "apiServerNetworks", 0), "999.0.0.1/8"),
    (("cluster", "groups", 0, "experts"), "0-3x"),
    (("cluster", "groups", 0, "experts"), {"0-1": "0-3x"}),
    (("cluster", "groups", 0, "max_replicas"), 99_999_999),
    (("cluster", "engine", "kwargs", "tensor_parallel_sise"), 2),
    (("cluster", "engine", "kv_cache_gib"), 1e9),
    (("router", "tolerations", 0, "operator"), "Exist"),
    (("router", "tolerations", 0, "effect"), "NoScedule"),
    (("router", "topologySpreadConstraints", 0, "whenUnsatisfiable"), "Sometimes"),
    (("router", "topologySpreadConstraints", 0, "maxSkew"), -1),
    ((*PREFERENCE, "weight"), 0),
    ((*PREFERENCE, "preference", "matchExpressions", 0, "operator"), "NotInn"),
    (("tls", "certManager", "issuerRef", "kind"), "ClusterIsuer"),
    (("router", "nodeSelector", "ex ample"), "a"),
    (("cluster", "groups", 0, "experts"), {"0-x": "0-3"}),
    (("cluster", "model", "artifact"), "/models/../etc"),
    (("cluster", "model", "artifact"), "/models//artifact"),
    (("model", "mountPath"), "/mo\x01dels"),
    (("model", "prepare", "download"), "/models/a:"),
    (("httpRoute", "hostnames", 0), "Mesh.Example.com"),
    (("httpRoute", "parentRefs", 0, "namespace"), "gate.ways"),
    (("httpRoute", "parentRefs", 0, "sectionName"), "https_8443"),
    (("monitoring", "podMonitor", "interval"), "30s1m"),
]


@pytest.mark.parametrize(
    ("path", "value"),
    WRONG,
    ids=lambda part: ".".join(map(str, part)) if isinstance(part, tuple) else "",
)
def test_lint_and_template_name_the_key(tmp_path: Path, path: tuple[str | int, ...], value: object) -> None:
    values = merged(CPU)
    values["router"] |= copy.deepcopy(PLACED)
    values["httpRoute"] |= copy.deepcopy(ROUTED)
    at(values, path[:-1])[path[-1]] = value
    file = write(tmp_path, values)
    for command in (
        ("lint", "--strict", str(CHART), "-f", str(file)),
        ("template", "demo", str(CHART), "-f", str(file)),
    ):
        with pytest.raises(HelmError) as caught:
            helm(*command)
        assert_named(path, str(caught.value))


def assert_named(path: tuple[str | int, ...], said: str) -> None:
    """Where the schema does not know the key, the object is named that holds it, and the key."""
    place = "".join(f"/{part}" for part in (path if known(path) else path[:-1]))
    assert f"at '{place}'" in said and str(path[-1]) in said


def test_what_those_cases_start_from_is_taken(tmp_path: Path) -> None:
    values = merged(CPU)
    values["router"] |= PLACED
    values["httpRoute"] |= ROUTED
    assert {"RayService", "HTTPRoute"} <= {one["kind"] for one in objects(template(write(tmp_path, values)))}


def known(path: tuple[str | int, ...]) -> bool:
    """Whether the schema knows the key, so that only its value is wrong."""
    return path[-1] not in ("expertPool", "max_replica", "nodeAffinty", "tensor_parallel_sise", "ex ample")


GROUP = "cluster.groups[0]"


UNFIT = [
    ({f"{GROUP}.min_replicas": "3"}, "cluster.groups[0]: max_replicas 2 < min_replicas 3"),
    (
        {f"{GROUP}.experts": "0\\,5-3"},
        'cluster.groups[0].experts: "5-3" is not an ascending range of indices below 2^20',
    ),
    ({f"{GROUP}.experts": "0-1048576"}, 'cluster.groups[0].experts: "0-1048576" is not an ascending range'),
    ({"cluster.groups[1].name": "a"}, 'cluster.groups[1].name: "a" stands twice'),
    (
        {f"{GROUP}.resources.gpus": "1"},
        'cluster.groups[0].resources: there is no pool "gpus"; expertPools has: experts',
    ),
    ({f"{GROUP}.num_cpus": "5"}, "cluster.groups[0]: takes 5 CPUs, a pod of pool experts requests 4"),
    ({f"{GROUP}.num_gpus": "1"}, "cluster.groups[0]: takes 1 GPUs, a pod of pool experts has 0"),
    (
        {"ray.gcsFaultTolerance.passwordSecret": "redis"},
        "ray.gcsFaultTolerance.redisAddress: a password is given, but no Redis is named",
    ),
    ({"cluster.engine.degrade_after_s": "300"}, "cluster.engine: degrade_after_s 300 > wait_for_experts_s 120"),
    ({"cluster.engine.min_replicas": "2"}, "cluster.engine: max_replicas 1 < min_replicas 2"),
    ({"cluster.engine.num_cpus": "3"}, "cluster.engine: takes 4 CPUs, a pod of pool router requests 3"),
    (
        {"cluster.engine.resources.experts": "1"},
        'cluster.engine.resources: it runs in the pool router, not in "experts"',
    ),
    ({"cluster.directory.resources.router": "null"}, "cluster.directory.resources: {router: 0.001} is missing"),
    ({"cluster.model.name": ""}, "cluster.model.name: the name of the model in the OpenAI API is missing"),
    ({"cluster.model.artifact": "/data/a"}, "cluster.model.artifact: /data/a is not on the model volume"),
    ({"cluster.server.grpc_port": "8000"}, "cluster.server: http_port and grpc_port are both 8000"),
    ({"cluster.server.grpc_tls_port": "8000"}, "cluster.server: http_port and grpc_tls_port are both 8000"),
    ({"cluster.server.grpc_tls_port": "9000"}, "cluster.server: grpc_port and grpc_tls_port are both 9000"),
    ({"cluster.server.grpc_tls_port": "10500"}, "cluster.server.grpc_tls_port: 10500 is one of those of Ray's"),
    ({"cluster.server.grpc_port": "50052"}, "cluster.server.grpc_port: 50052 lies within replica_ports"),
    ({"cluster.server.http_port": "10500"}, "cluster.server.http_port: 10500 is one of those of Ray's workers"),
    (
        {"cluster.server.replica_ports": "{9990,10005}"},
        "replica_ports: [9990 10005] hold 10001, which is Ray's own",
    ),
    ({"cluster.server.replica_ports": "{52360,52366}"}, "replica_ports: [52360 52366] hold 5236"),
    ({"cluster.server.replica_ports": "{11000,11050}"}, "lie among those of Ray's workers"),
    ({"cluster.server.http_port": "8265"}, "cluster.server.http_port: 8265 is Ray's own (dashboard)"),
    (
        {"cluster.server.replica_ports": "{60000,50114}"},
        "cluster.server.replica_ports: [60000 50114] does not ascend",
    ),
    ({"expertPools[0].name": "router"}, 'expertPools[0].name: "router" stands twice'),
    ({"expertPools[0].minReplicas": "4"}, "expertPools[0]: maxReplicas 3 < minReplicas 4"),
    ({"pods.drainSeconds": "200"}, "pods.terminationGracePeriodSeconds: 120 is no more than"),
    ({"tls.mode": "existing"}, "tls.existingSecret: tls.mode is existing, but no Secret is named"),
    ({"tls.mode": "certManager", "tls.certManager.renewBefore": "8760h"}, "shorter; they are 8760h and 8760h"),
    ({"tls.mode": "certManager", "tls.certManager.renewBefore": "4m59s"}, "they are 8760h and 4m59s"),
    (
        {"tls.mode": "certManager", "tls.certManager.duration": "59m", "tls.certManager.renewBefore": "5m"},
        "tls.certManager: cert-manager wants a duration of 1h at least",
    ),
    ({"model.prepare.source": ""}, "model.prepare.source: the checkpoint is missing"),
    ({"model.prepare.source": "/elsewhere/m"}, "model.prepare.source: /elsewhere/m is not on the model volume"),
    (
        {"model.prepare.source": "s3://bucket/m", "model.prepare.download": "/elsewhere/m"},
        "model.prepare.download: /elsewhere/m is not on the model volume",
    ),
    ({"ingress.enabled": "true"}, "ingress.host: the host name is missing"),
    ({"httpRoute.enabled": "true"}, "httpRoute.parentRefs: no Gateway is named"),
]


@pytest.mark.parametrize(
    ("settings", "message"),
    UNFIT,
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_what_the_schema_cannot_say(settings: dict[str, str], message: str) -> None:
    with pytest.raises(HelmError) as caught:
        template(CPU, settings=settings)
    assert message in str(caught.value)
    if "null" in settings.values():
        return  # lint does not take a default away
    given = [f"--set={key}={value}" for key, value in settings.items()]
    with pytest.raises(HelmError) as caught:
        helm("lint", "--strict", str(CHART), "-f", str(CPU), *given)
    _, _, refused = str(caught.value).replace('\\"', '"').rpartition("[ERROR]")
    assert message in refused


@pytest.mark.parametrize("release", ["x" * 40, "1st"])
def test_names_that_kuberay_refuses(release: str) -> None:
    with pytest.raises(HelmError, match="fullnameOverride: the RayService would be named"):
        template(CPU, release=release)


def test_without_kuberay() -> None:
    with pytest.raises(HelmError, match=r"no kind RayService of ray\.io/v1: install the KubeRay operator"):
        template(CPU, api_versions=())
    assert "kind: RayService" in template(CPU, api_versions=(), settings={"ray.requireKubeRay": "false"})


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("monitoring.podMonitor.enabled=true", "PodMonitor"),
        ("monitoring.rules.enabled=true", "PrometheusRule"),
        ("tls.mode=certManager", "Certificate"),
    ],
)
def test_without_an_operator(setting: str, kind: str) -> None:
    key, _, value = setting.partition("=")
    with pytest.raises(HelmError, match=f"the cluster has no kind .*/{kind}"):
        template(CPU, settings={key: value}, api_versions=("ray.io/v1/RayService",))


def test_too_old_a_cluster() -> None:
    with pytest.raises(HelmError, match="requires kubeVersion"):
        template(CPU, kube_version="1.26.9")
