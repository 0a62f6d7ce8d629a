"""The Serve config that the chart renders is the one that `expertmesh up` would deploy for the same cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from expertmesh.args import GroupArgs, RouterArgs
from expertmesh.artifact.manifest import ExpertFunction, Manifest
from expertmesh.config import ClusterConfig
from expertmesh.deployment import serve_config
from expertmesh.directory.secure_port import secure_port
from expertmesh.kubernetes.groups import read_group
from expertmesh.kubernetes.serve_text import read_applications
from tools.chart.helm import CHART, objects, template, values_files

pytestmark = pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")
TLS = "/etc/expertmesh/tls"
API_KEYS = "/etc/expertmesh/api-keys/keys"


def merged(file: Path) -> dict[str, Any]:
    """Values as Helm sees them: maps merged, all else replaced."""

    def over(base: Any, given: Any) -> Any:
        if isinstance(base, dict) and isinstance(given, dict):
            return base | {key: over(base.get(key), value) for key, value in given.items()}
        return given

    found: dict[str, Any] = over(yaml.safe_load((CHART / "values.yaml").read_text()), yaml.safe_load(file.read_text()))
    return found


def cluster_config(file: Path, fullname: str) -> ClusterConfig:
    """What the values describe, in ClusterConfig's own words."""
    values = merged(file)
    tls = None
    if values["tls"]["mode"] != "off":
        name = values["tls"]["serverName"] or f"{fullname}-experts"
        tls = {"ca": f"{TLS}/ca.crt", "certificate": f"{TLS}/tls.crt", "key": f"{TLS}/tls.key", "server_name": name}
    server = values["cluster"]["server"] | {"host": "0.0.0.0", "replica_host": "auto"}
    security = {"tls": tls, "api_keys": API_KEYS if values["apiKeys"]["enabled"] else None}
    return ClusterConfig.model_validate(values["cluster"] | {"server": server, "security": security})


def manifest() -> Manifest:
    """Of a model that has all experts that the examples name."""
    return Manifest(
        name="any",
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        hidden_size=8,
        intermediate_size=16,
        layers=dict.fromkeys(range(64), 256),
        top_k=2,
        dtype="float32",
        expert_function=ExpertFunction(activation="silu"),
        fingerprint="f" * 64,
        expert_bytes=1024,
    )


def rendered(file: Path, **settings: str) -> tuple[str, dict[str, Any]]:
    """The RayService's name and its Serve config."""
    (service,) = (one for one in objects(template(file, settings=settings)) if one["kind"] == "RayService")
    return service["metadata"]["name"], yaml.safe_load(service["spec"]["serveConfigV2"])


@pytest.mark.parametrize("file", values_files(), ids=lambda file: file.stem)
def test_it_is_what_up_would_deploy(file: Path) -> None:
    name, found = rendered(file)
    wanted = json.loads(json.dumps(serve_config(cluster_config(file, name), manifest())))
    assert found["applications"] == wanted["applications"]
    assert found == wanted


def test_without_security() -> None:
    file = CHART / "ci" / "cpu-values.yaml"
    _, found = rendered(file, **{"tls.mode": "off", "apiKeys.enabled": "false"})
    by_name = {one["name"]: one["args"] for one in found["applications"]}
    assert by_name["experts-a"]["tls"] is by_name["router"]["tls"] is by_name["router"]["api_keys"] is None
    assert by_name["directory"] == {}
    assert by_name["experts-a"]["directory"] == "127.0.0.1:9000"


def pods_of(rendered: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(whose, pod's spec) of all pods that the objects make."""
    found = []
    for one in rendered:
        match one["kind"]:
            case "Pod":
                found.append((one["metadata"]["name"], one["spec"]))
            case "Job" | "Deployment":
                found.append((one["metadata"]["name"], one["spec"]["template"]["spec"]))
            case "RayService":
                cluster = one["spec"]["rayClusterConfig"]
                found.append(("head", cluster["headGroupSpec"]["template"]["spec"]))
                found += [(group["groupName"], group["template"]["spec"]) for group in cluster["workerGroupSpecs"]]
    return found


@pytest.mark.parametrize("mode", ["off", "generated"])
def test_whoever_asks_the_directory_has_what_it_asks_for(mode: str) -> None:
    """Every pod of Ray, where Serve's proxy and the autoscaler are, and the two clients beside it."""
    settings = {"tls.mode": mode, "rebalancer.enabled": "true"}
    made = objects(template(CHART / "ci" / "cpu-values.yaml", settings=settings))
    ports, name = cluster_config(CHART / "ci" / "cpu-values.yaml", "demo-expertmesh"), "demo-expertmesh-experts"
    secured = mode != "off"
    port = ports.server.grpc_tls_port if secured else ports.server.grpc_port
    made = [one for one in made if one["kind"] != "Job"]  # prepares the artifact, asks nobody
    for whose, spec in pods_of(made):
        container = spec["containers"][0]
        mounted = [one["mountPath"] for one in container["volumeMounts"] if one["name"] == "tls"]
        assert mounted == ([TLS] if secured else []), whose
        told = {one["name"]: one.get("value") for one in container.get("env", ())}
        if whose.endswith(("-rebalancer", "-test")):
            asks = [one.partition("=")[0] for one in container["args"] if f"svc:{port}" in one]
            assert asks == ["--directory" if secured or whose.endswith("-rebalancer") else "--grpc"]
            assert ({f"--tls={TLS}", f"--tls-name={name}"} <= set(container["args"])) is secured
        else:
            wanted = secure_port(told)
            assert (wanted is not None) is secured
            assert wanted is None or (wanted.port, wanted.tls) == (port, ports.security.tls)


def test_helm_test_asks_for_a_completion_where_it_has_a_key() -> None:
    """Beside keys of others it is given none, and checks that it is refused."""
    for settings, keyless in (
        ({}, False),
        ({"apiKeys.enabled": "false"}, False),
        ({"apiKeys.existingSecret": "keys"}, True),
        ({"apiKeys.existingSecret": "keys", "apiKeys.testSecret": "key"}, False),
    ):
        made = objects(template(CHART / "ci" / "cpu-values.yaml", settings=settings))
        (pod,) = (one for one in made if one["kind"] == "Pod")
        (container,) = pod["spec"]["containers"]
        assert ("--no-key" in container["args"]) is keyless
        assert bool(container.get("env")) is (not keyless and settings.get("apiKeys.enabled") != "false")


@pytest.mark.parametrize("file", values_files(), ids=lambda file: file.stem)
def test_ray_and_the_applications_take_it(file: Path) -> None:
    _, found = rendered(file)
    schema = ServeDeploySchema.model_validate(found)
    for application in schema.applications:
        if application.name == "router":
            RouterArgs.model_validate(application.args)
        elif application.name != "directory":
            GroupArgs.model_validate(application.args)


@pytest.mark.parametrize("file", values_files(), ids=lambda file: file.stem)
def test_the_client_reads_the_groups_back(file: Path) -> None:
    """`expertmesh kubernetes` knows a release by its Serve config alone."""
    (service,) = (one for one in objects(template(file)) if one["kind"] == "RayService")
    applications = read_applications(service["spec"]["serveConfigV2"])
    found = [read_group(one) for name, one in applications.items() if name.startswith("experts-")]
    wanted = cluster_config(file, service["metadata"]["name"])
    unseen = {"memory_gib": None}  # a check of `up`, which Serve is not told
    given = [group.model_copy(update={"scaling": group.scaling or wanted.scaling} | unseen) for group in wanted.groups]
    assert found == given
