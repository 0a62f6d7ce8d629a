"""All that the chart can render, checked against the schemas of Kubernetes 1.27 to 1.37 and of the CRDs of others."""

from __future__ import annotations

import functools
import itertools
import operator
import tarfile
from pathlib import Path

import pytest
from chart_schemas import CHECKED, VERSIONS, check
from test_upgrades import pods_of

from tools.chart.helm import API_VERSIONS, CHART, HelmError, Manifest, helm, objects, template, values_files

pytestmark = pytest.mark.kubernetes

CPU = CHART / "ci" / "cpu-values.yaml"
SWITCHES = {
    "tls.mode": ("off", "generated", "existing", "certManager"),
    "apiKeys.enabled": ("true", "false"),
    "apiKeys.existingSecret": ("", "keys"),
    "apiKeys.testSecret": ("", "test-key"),
    "image.digest": ("", f"sha256:{'0' * 64}"),
    "ray.upgradeStrategy": ("None", "NewCluster"),
    "networkPolicy.enabled": ("true", "false"),
    "podDisruptionBudget.enabled": ("true", "false"),
    "serviceAccount.create": ("true", "false"),
    "model.prepare.enabled": ("true", "false"),
    "model.prepare.source": ("/models/checkpoint", "s3://bucket/checkpoint"),
    "model.existingClaim": ("", "shared"),
    "ray.authSecret": ("", "auth"),
    "ray.gcsFaultTolerance.redisAddress": ("", "redis.example:6379"),
    "ingress.enabled": ("true", "false"),
    "httpRoute.enabled": ("true", "false"),
    "monitoring.podMonitor.enabled": ("true", "false"),
    "monitoring.rules.enabled": ("true", "false"),
    "monitoring.dashboards.enabled": ("true", "false"),
    "rebalancer.enabled": ("true", "false"),
}
FIXED = {
    "ingress.host": "mesh.example.com",
    "httpRoute.parentRefs[0].name": "gateway",
    "httpRoute.parentRefs[0].namespace": "gateways",
    "httpRoute.parentRefs[0].sectionName": "https",
    "httpRoute.parentRefs[0].port": "443",
    "httpRoute.hostnames[0]": "*.example.com",
    "tls.existingSecret": "own-tls",
    "networkPolicy.clients[0].podSelector.matchLabels.app": "client",
}
KIND_OF = {
    "networkPolicy.enabled": "NetworkPolicy",
    "podDisruptionBudget.enabled": "PodDisruptionBudget",
    "model.prepare.enabled": "Job",
    "serviceAccount.create": "Role",
    "ingress.enabled": "Ingress",
    "httpRoute.enabled": "HTTPRoute",
    "monitoring.podMonitor.enabled": "PodMonitor",
    "monitoring.rules.enabled": "PrometheusRule",
    "monitoring.dashboards.enabled": "ConfigMap",
    "rebalancer.enabled": "Deployment",
}
"""There with the switch, and else not."""
KINDS = {
    "ConfigMap",
    "Deployment",
    "Job",
    "NetworkPolicy",
    "PersistentVolumeClaim",
    "Pod",
    "PodDisruptionBudget",
    "RayService",
    "Role",
    "RoleBinding",
    "Secret",
    "ServiceAccount",
}


def pairs() -> list[dict[str, str]]:
    """Settings in which any two switches meet in all their positions (greedily chosen, much fewer than all)."""
    waiting = {
        frozenset({(one, a), (two, b)})
        for one, two in itertools.combinations(SWITCHES, 2)
        for a in SWITCHES[one]
        for b in SWITCHES[two]
    }
    chosen: list[dict[str, str]] = []
    while waiting:
        settings: dict[str, str] = dict(min(waiting, key=sorted))
        for switch, positions in SWITCHES.items():
            if switch not in settings:
                met = {
                    at: sum(frozenset({(switch, at), pair}) in waiting for pair in settings.items()) for at in positions
                }
                settings[switch] = max(positions, key=met.__getitem__)
        waiting -= {frozenset(pair) for pair in itertools.combinations(settings.items(), 2)}
        chosen.append(settings)
    return chosen


@pytest.mark.parametrize("version", VERSIONS)
def test_every_values_file_on_every_kubernetes(version: str) -> None:
    seen = set()
    for file in values_files():
        rendered = objects(template(file, kube_version=version))
        check(rendered, version)
        seen |= {one["kind"] for one in rendered}
    assert seen >= KINDS


def test_switches_in_pairs() -> None:
    for number, settings in enumerate(pairs()):
        version = VERSIONS[number % len(VERSIONS)]
        rendered = objects(template(CPU, settings=FIXED | settings, kube_version=version))
        check(rendered, version)
        CHECKED["combinations"] += 1
        kinds = [one["kind"] for one in rendered]
        assert {switch for switch, kind in KIND_OF.items() if (kind in kinds) != (settings[switch] == "true")} == set()
        assert ("Certificate" in kinds) == (settings["tls.mode"] == "certManager")
        assert ("PersistentVolumeClaim" in kinds) == (not settings["model.existingClaim"])
        assert_references_exist(rendered)
        given = [f"--set={key}={value}" for key, value in (FIXED | settings).items()]
        helm("lint", "--strict", str(CHART), "-f", str(CPU), "--kube-version", version, *given)


@pytest.mark.parametrize(("length", "named"), [(64, True), (65, False)])
def test_a_certificate_bears_a_common_name_where_it_may(length: int, named: bool) -> None:
    """X.509 takes 64 characters there."""
    name = f"{'x' * 60}.{'y' * (length - 61)}"
    rendered = objects(template(CPU, settings={"tls.mode": "certManager", "tls.serverName": name}))
    (spec,) = (one["spec"] for one in rendered if one["kind"] == "Certificate" and not one["spec"].get("isCA"))
    assert spec["dnsNames"] == [name]
    assert spec.get("commonName") == (name if named else None)


def assert_references_exist(rendered: list[Manifest]) -> None:
    """What pods mount and name is among the objects, unless a value names it."""
    made = {(one["kind"], one["metadata"]["name"]) for one in rendered}
    certificates = {one["spec"]["secretName"] for one in rendered if one["kind"] == "Certificate"}
    given = {"auth", "shared", "own-tls", "keys", "test-key"}
    for _, spec in pods_of(rendered):
        for volume in spec["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            secret = volume.get("secret", {}).get("secretName")
            assert claim is None or claim in given or ("PersistentVolumeClaim", claim) in made
            assert secret is None or secret in certificates | given or ("Secret", secret) in made


@pytest.mark.parametrize("missing", API_VERSIONS)
def test_api_versions(missing: str) -> None:
    """Where a kind is missing, only what needs it is refused."""
    others = [one for one in API_VERSIONS if one != missing]
    if missing == "ray.io/v1/RayService":
        with pytest.raises(HelmError, match="install the KubeRay operator"):
            template(CPU, api_versions=others)
        return
    check(objects(template(CPU, api_versions=others)), VERSIONS[-1])
    with pytest.raises(HelmError, match=f"the cluster has no kind {missing}"):
        template(CHART / "ci" / "gpu-values.yaml", api_versions=others)


@pytest.mark.parametrize("file", values_files(), ids=lambda file: file.stem)
def test_lint(file: Path) -> None:
    helm("lint", "--strict", str(CHART), "--values", str(file))


def test_package(tmp_path: Path) -> None:
    """What a registry would hold: it renders the same, with README and examples and without CI's values."""
    helm("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("*.tgz")
    example = CHART / "examples" / "deepseek-v3-32-gpus.yaml"
    assert template(example, chart=package) == template(example)
    with tarfile.open(package) as archive:
        names = {name.removeprefix("expertmesh/") for name in archive.getnames()}
    assert {"README.md", "values.schema.json", "examples/demo-cpu.yaml", "templates/NOTES.txt"} <= names
    assert not any(name.startswith(("ci/", "README.head")) for name in names)


def test_a_typo_in_a_pod_is_seen() -> None:
    """The validators themselves refuse what they should."""
    rendered = objects(template(CPU))
    (service,) = (one for one in rendered if one["kind"] == "RayService")
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["tolerationz"] = []
    with pytest.raises(pytest.fail.Exception, match="tolerationz"):
        check([service], VERSIONS[0])
    (job,) = (one for one in rendered if one["kind"] == "Job")
    job["spec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    with pytest.raises(pytest.fail.Exception, match="imagePulPolicy"):
        check([job], VERSIONS[0])


@pytest.mark.parametrize(
    ("kind", "path", "required"),
    [
        ("Issuer", ["spec", "ca"], "secretName"),
        ("Certificate", ["spec", "issuerRef"], "name"),
        ("HTTPRoute", ["spec", "rules", 0, "backendRefs", 0], "name"),
        ("PodMonitor", ["spec"], "selector"),
        ("PrometheusRule", ["spec", "groups", 0, "rules", 0], "expr"),
    ],
)
def test_a_typo_in_a_custom_kind_is_seen(kind: str, path: list[str | int], required: str) -> None:
    settings = {"tls.mode": "certManager", **{f"{key}.enabled": "true" for key in ("httpRoute", "monitoring.rules")}}
    rendered = objects(template(CPU, settings=FIXED | settings | {"monitoring.podMonitor.enabled": "true"}))
    one = [one for one in rendered if one["kind"] == kind][-1]
    check([one], VERSIONS[0])
    part = functools.reduce(operator.getitem, path, one)
    right = part.pop(required)
    for wrong, message in (
        ({}, f"'{required}' is a required property"),
        ({required: None}, "None"),
        ({required: right, "unknownKey": "x"}, "'unknownKey' was unexpected"),
    ):
        part.update(wrong)
        with pytest.raises(pytest.fail.Exception, match=message):
            check([one], VERSIONS[0])
    del part["unknownKey"]
    one["metadata"]["lables"] = {}
    with pytest.raises(pytest.fail.Exception, match="lables"):
        check([one], VERSIONS[0])


def test_a_kind_without_a_schema_is_seen() -> None:
    unknown = {"apiVersion": "monitoring.coreos.com/v2", "kind": "PodMonitor", "metadata": {"name": "x"}}
    with pytest.raises(pytest.fail.Exception, match=r"no schema of monitoring\.coreos\.com/v2 PodMonitor"):
        check([unknown], VERSIONS[0])
