"""What an upgrade changes, seen in what is rendered: KubeRay's answer to each change follows from it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_refusals import write
from test_serve_config import merged, pods_of

from tools.chart.helm import CHART, objects, template, values_files

CPU = CHART / "ci" / "cpu-values.yaml"
SECRETS = {
    "ray.authSecret": "auth",
    "apiKeys.existingSecret": "keys",
    "tls.mode": "existing",
    "tls.existingSecret": "tls",
}
"""So that nothing is generated, which without a cluster is new each time."""
Objects = dict[tuple[str, str], dict[str, Any]]


def render(values: dict[str, Any], folder: Path) -> Objects:
    found = objects(template(write(folder, values), settings=SECRETS))
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def take_serve_config(rendered: Objects) -> dict[str, Any]:
    """Takes the Serve config out of the RayService and returns its applications by name."""
    (service,) = (one for (kind, _), one in rendered.items() if kind == "RayService")
    config = yaml.safe_load(service["spec"].pop("serveConfigV2"))
    return {one["name"]: one for one in config["applications"]}


@pytest.mark.parametrize("file", values_files(), ids=lambda file: file.stem)
def test_one_line_of_a_group_changes_nothing_but_the_serve_config(file: Path, tmp_path: Path) -> None:
    values = merged(file)
    before = render(values, tmp_path)
    values["cluster"]["groups"][0]["max_replicas"] = 9
    after = render(values, tmp_path)
    applications_before, applications_after = take_serve_config(before), take_serve_config(after)
    assert before == after
    group = f"experts-{values['cluster']['groups'][0]['name']}"
    changed = [name for name in applications_before if applications_before[name] != applications_after[name]]
    assert changed == [group]
    assert applications_before[group]["args"] == applications_after[group]["args"]
    for applications in (applications_before, applications_after):
        (deployment,) = applications[group]["deployments"]
        deployment["autoscaling_config"].pop("max_replicas")
    assert applications_before == applications_after


def test_an_appended_group_touches_no_other_application(tmp_path: Path) -> None:
    values = merged(CPU)
    before = render(values, tmp_path)
    values["cluster"]["groups"].append({"name": "hot", "experts": "0,5", "resources": {"experts": 1}})
    after = render(values, tmp_path)
    applications_before, applications_after = take_serve_config(before), take_serve_config(after)
    assert applications_after.pop("experts-hot")
    assert applications_before == applications_after
    assert "hot" in after.pop(("Pod", "demo-expertmesh-test"))["spec"]["containers"][0]["args"]
    before.pop(("Pod", "demo-expertmesh-test"))
    assert before == after


def test_an_appended_pool_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    """Which is what KubeRay applies in place."""
    values = merged(CPU)
    before = render(values, tmp_path)
    pool = copy.deepcopy(values["expertPools"][0]) | {"name": "more"}
    values["expertPools"].append(pool)
    after = render(values, tmp_path)
    assert take_serve_config(before) == take_serve_config(after)
    assert after.pop(("PodDisruptionBudget", "demo-expertmesh-pool-more"))
    groups = after["RayService", "demo-expertmesh"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert groups.pop()["groupName"] == "more"
    assert before == after


def test_pods_bear_nothing_of_the_chart_s_version(tmp_path: Path) -> None:
    """Since KubeRay takes a changed pod for another cluster."""
    import shutil

    chart = tmp_path / "expertmesh"
    shutil.copytree(CHART, chart)
    description = (chart / "Chart.yaml").read_text()
    (chart / "Chart.yaml").write_text(description.replace("version: 0.1.0\nappVersion", "version: 9.9.9\nappVersion"))
    assert "9.9.9" in (chart / "Chart.yaml").read_text()
    services = []
    for one in (CHART, chart):
        rendered = objects(template(CPU, chart=one, settings=SECRETS))
        services += [found for found in rendered if found["kind"] == "RayService"]
        assert any(found["metadata"]["labels"].get("helm.sh/chart") for found in rendered)
    assert services[0] == services[1]


@pytest.mark.parametrize("file", values_files(), ids=lambda file: file.stem)
def test_what_kuberay_asks_of_a_rayservice(file: Path) -> None:
    """Facts read from KubeRay 1.6 and 1.7."""
    (service,) = (one for one in objects(template(file)) if one["kind"] == "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert ports["serve"] == serve["http_options"]["port"]
    assert ports["serve-grpc"] == serve["grpc_options"]["port"]
    directories = {one["args"]["directory"] for one in serve["applications"] if "directory" in one["args"]}
    assert directories == {f"127.0.0.1:{ports['serve-grpc-tls']}"}
    assert max(map(len, ports)) <= 15, "Kubernetes' limit of a port's name"
    assert len(service["metadata"]["name"]) <= 47
    assert service["spec"]["upgradeStrategy"]["type"] in ("None", "NewCluster")
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        spec = group["template"]["spec"]
        worker = {port["name"]: port["containerPort"] for port in spec["containers"][0]["ports"]}
        assert worker == {name: ports[name] for name in ("serve", "serve-grpc", "serve-grpc-tls", "metrics")}
        # the head's service selects pods by KubeRay's own app.kubernetes.io/name
        assert "app.kubernetes.io/name" not in group["template"]["metadata"]["labels"]
        # the autoscaler, in its second version, restarts nothing by itself
        assert spec["restartPolicy"] == "Never"


@pytest.mark.parametrize("file", values_files(), ids=lambda file: file.stem)
def test_every_pod_is_confined(file: Path) -> None:
    """What Kubernetes' restricted pod security standard asks, and a read-only root besides."""
    for name, spec in pods_of(objects(template(file))):
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        mounts = {volume["name"] for volume in spec["volumes"]}
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert {mount["name"] for mount in container["volumeMounts"]} <= mounts, name
            assert container["resources"]["limits"]["memory"], name
