"""docs/kubernetes.md from beginning to end on a real API server: a command runs as written, or is listed with why not.

Names of namespaces are the test's own. No pod ever runs here; of KubeRay, its stand-in reports what Ray Serve does.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay_stand_in import RayServiceObject, admin
from kubernetes_testbed import ApiServer, tool
from test_guide import GUIDE, commands, commands_of, shell
from test_release import chart

from expertmesh.api_keys import admits, parse
from tools.chart.helm import ROOT

__all__ = ["chart"]
NETWORK, NODES, DIRECTORY = "needs the network", "needs pods that run", "needs a directory, which runs in a pod"
SHOWN = "runs in another test"
NOT_RUN = {
    "kind ": "makes containers",
    "docker ": NETWORK,
    "tools/image ": NETWORK,
    "helm repo add ": NETWORK,
    "helm install kuberay-operator ": NETWORK,
    "helm install gpu-operator ": NETWORK,
    "helm install traefik ": NETWORK,
    "helm install cert-manager ": NETWORK,
    "helm install monitoring ": NETWORK,
    "hf download ": NETWORK,
    "aws s3 sync ": NETWORK,
    "git clone ": NETWORK,
    "expertmesh plan --shape ": f"{SHOWN}: test_the_plan_prints_what_the_guide_quotes",
    "helm test ": NODES,
    "kubectl -n expertmesh wait --for=condition=Ready ": NODES,
    "export POD=": NODES,
    "kubectl -n expertmesh cp ": NODES,
    "kubectl -n expertmesh exec ": NODES,
    "kubectl -n expertmesh logs ": NODES,
    "kubectl -n expertmesh port-forward ": NODES,
    "expertmesh kubernetes logs ": NODES,
    "curl ": NODES,
    "expertmesh loadtest ": NODES,
    "watch expertmesh kubernetes status ": f"{DIRECTORY}, and goes on for ever",
    "kubectl -n expertmesh get pods -L ray.io/group -w": "goes on for ever",
    "expertmesh plan --config ": f"{DIRECTORY}; without one: test_a_plan_keeps_what_groups_get",
    "expertmesh kubernetes rebalance ": "takes the plan before it; tests/kubernetes has it",
    "helm uninstall kuberay-operator ": "was not installed",
    "kubectl delete namespace kuberay": "was not made",
    "kubectl delete crd ": "other tests use the same server",
}
"""How a command begins, and why it is left out."""
NO_CONTROLLER = ("kubectl delete namespace ", "kubectl -n expertmesh delete pvc ")
"""What takes finalizers away does not run here: these ask for the deletion and do not wait for its end."""


def steps() -> Iterator[tuple[str, str, str]]:
    """Heading, language and text of the guide's blocks, in order."""
    heading = ""
    for found in re.finditer(r"^(?:##+ ([^\n]*)$|```(\w+)\n(.*?)^```)", GUIDE, flags=re.MULTILINE | re.DOTALL):
        heading = found[1] or heading
        if found[2]:
            yield heading, found[2], found[3]


def why_not(line: str) -> str | None:
    return next((why for begin, why in NOT_RUN.items() if line.startswith(begin)), None)


def test_what_is_left_out_is_in_the_guide() -> None:
    assert [begin for begin in NOT_RUN if not any(line.startswith(begin) for line in commands())] == []


class Shell:
    """Runs lines one after the other in one folder; what they export stays."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        helm = tool("helm").parent
        self.folder = folder
        self._environment = server.environment | {
            "PATH": f"{helm}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "ACCESS_KEY": "access",
            "SECRET_KEY": "secret",
        }

    def run(self, line: str) -> str:
        """What it printed; fails the test where the line fails."""
        kept = self.folder / ".exports"
        script = f"{line}\ndeclare -px > {kept}"
        if kept.exists():
            script = f"source {kept}\n{script}"
        return shell(script, self.folder, self._environment, line, "-o", "pipefail")


@pytest.fixture
def folder(tmp_path: Path, chart: Path) -> Path:
    """A checkout whose chart installs on this old server."""
    shutil.copytree(chart, tmp_path / "helm/expertmesh")
    shutil.copytree(ROOT / "examples/kubernetes", tmp_path / "examples/kubernetes")
    values = tmp_path / "helm/expertmesh/values.yaml"
    before = values.read_text()
    values.write_text(re.sub(r"(?m)^(podDisruptionBudget:\n.*\n  enabled: )true", r"\1false", before))
    assert values.read_text() != before
    subject = ["-subj", "/CN=mixtral.example.com", "-keyout", "host.key", "-out", "host.crt"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    return tmp_path


@pytest.fixture
def others(api_server: ApiServer) -> Iterator[None]:
    """What NVIDIA's and Prometheus' operators would bring: a node with GPUs, and the kinds of step 10."""
    kinds = {"PodMonitor": "podmonitors", "PrometheusRule": "prometheusrules"}
    made: list[dict[str, Any]] = [
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.monitoring.coreos.com"},
            "spec": {
                "group": "monitoring.coreos.com",
                "scope": "Namespaced",
                "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
                "versions": [
                    {
                        "name": "v1",
                        "served": True,
                        "storage": True,
                        "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
                    }
                ],
            },
        }
        for kind, plural in kinds.items()
    ]
    labels = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    made.append({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "gpus", "labels": labels}})
    text = yaml.safe_dump_all(made)
    api_server.kubectl("create", "-f", "-", stdin=text)
    allocatable = json.dumps({"status": {"allocatable": {"nvidia.com/gpu": "8"}}})
    api_server.kubectl("patch", "node", "gpus", "--subresource=status", "--type=merge", "-p", allocatable)
    for plural in kinds.values():
        api_server.kubectl("wait", "--for=condition=Established", f"crd/{plural}.monitoring.coreos.com")
    yield
    api_server.kubectl("delete", "-f", "-", stdin=text)


class Replay:
    """The guide's lines as they run, and what stands in for KubeRay."""

    def __init__(self, server: ApiServer, namespace: str, folder: Path) -> None:
        self.server, self.namespace = server, namespace
        self.shell = Shell(server, folder)
        self.printed: dict[str, str] = {}
        self.specs: list[dict[str, Any]] = []
        """Of mixtral's RayService after each command that may change it."""
        self._operators = ExitStack()

    def run(self, heading: str, line: str) -> None:
        namespace = f"{self.namespace}-demo" if heading.startswith("A first try") else self.namespace
        written = re.sub(r"(?<=-n )expertmesh\b|(?<=namespace )expertmesh\b", namespace, line)
        if line.startswith(NO_CONTROLLER):
            written += " --wait=false"
        if " delete rayservice " in line:
            self._operators.close()
        self.printed[line] = self.shell.run(written)
        if installed := re.match(r"helm install (\w+) ", line):
            self._start_cluster(namespace, installed[1])
            self._operators.enter_context(self._service(namespace, installed[1]).operated())
        elif " delete raycluster " in line:
            self._start_cluster(namespace, "mixtral")
        elif " delete rayservice " in line:
            gone = ("delete", "raycluster", "mixtral-expertmesh", "-n", namespace)
            deletion = threading.Timer(1, self.server.kubectl, gone)
            deletion.start()
            self._operators.callback(deletion.join)
        if re.match(r"helm (install|upgrade|rollback) mixtral |expertmesh kubernetes scale (?!.*--dry-run)", line):
            self.specs.append(self.get("rayservice", "mixtral-expertmesh")["spec"])

    def close(self) -> None:
        self._operators.close()

    def get(self, kind: str, name: str) -> Any:
        return json.loads(self.server.kubectl("get", kind, name, "-n", self.namespace, "-o", "json"))

    def names(self, kinds: str, *selector: str) -> list[str]:
        return self.server.kubectl("get", kinds, "-n", self.namespace, "-o", "name", *selector).split()

    def secret(self, name: str, key: str) -> bytes:
        return base64.b64decode(self.get("secret", name)["data"][key])

    def _service(self, namespace: str, release: str) -> RayServiceObject:
        return RayServiceObject(admin(self.server, namespace), f"{release}-expertmesh")

    def _start_cluster(self, namespace: str, release: str) -> None:
        """As KubeRay does, but that its name would be a new one each time."""
        service = self._service(namespace, release)
        cluster = {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": {"name": service.name, "labels": {"ray.io/originated-from-cr-name": service.name}},
            "spec": service.get()["spec"]["rayClusterConfig"],
        }
        self.server.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(cluster))


@pytest.fixture
def replay(api_server: ApiServer, others: None, folder: Path) -> Iterator[Replay]:
    """In namespaces that the guide's own commands make."""
    made = Replay(api_server, f"guide-{secrets.token_hex(4)}", folder)
    yield made
    made.close()


@pytest.mark.kubernetes
def test_the_guide_from_beginning_to_end(replay: Replay) -> None:
    for heading, language, text in steps():
        if language == "yaml":  # "add to values.yaml"
            with (replay.shell.folder / "values.yaml").open("a") as values:
                values.write(text)
        for line in commands_of(text) if language == "sh" else ():
            if why_not(line) is None:
                replay.run(heading, line)
                look(replay, line)
    assert set(replay.printed) | {line for line in commands() if why_not(line)} == set(commands())

    groups = [[bounds(spec, group) for group in ("e01", "e23")] for spec in replay.specs]
    assert groups == [
        ["1-3", "1-3"],  # install
        ["1-5", "1-3"],  # the changed line
        ["1-5", "1-5"],  # scale
        ["1-5", "1-3"],  # which --force-conflicts takes back
        ["1-5", "1-3"],  # monitoring
        ["1-5", "1-3"],  # the upgrade of step 11
        ["1-3", "1-3"],  # rollback
    ]
    assert replay.specs[-1] == replay.specs[0]
    assert all(spec["rayClusterConfig"] == replay.specs[0]["rayClusterConfig"] for spec in replay.specs)
    (known,) = parse(replay.secret("expertmesh-api-keys", "keys").decode(), "keys")
    assert admits(replay.secret("expertmesh-test-key", "api-key"), [known.sha256]), "the key that was exported"
    assert replay.names("rayservice,raycluster,deployment,podmonitor") == []
    assert replay.server.helm("list", "-n", replay.namespace, "-q").strip() == ""
    claim = replay.get("pvc", "mixtral-expertmesh-model")
    assert "deletionTimestamp" in claim["metadata"]
    assert replay.get("namespace", replay.namespace)["status"]["phase"] == "Terminating"


def look(replay: Replay, line: str) -> None:
    """What a line should have brought, where later ones take it away again."""
    printed, folder = replay.printed[line], replay.shell.folder
    if line.startswith("kubectl get nodes"):
        assert printed.splitlines()[1].split() == ["gpus", "8", "NVIDIA-H100-80GB-HBM3"]
    elif line.endswith("> tls/tls.key"):
        for name in ("ca.crt", "tls.crt", "tls.key"):
            assert (folder / "tls" / name).read_bytes() == replay.secret("mixtral-expertmesh-tls", name)
    elif line.endswith("> running.json"):
        (group, *_) = json.loads((folder / "running.json").read_text())["groups"]
        assert (group["name"], group["max_replicas"]) == ("e01", 5)
    elif line.startswith("helm upgrade ") and "podMonitor" in (folder / "values.yaml").read_text():
        kinds = replay.names("podmonitor,prometheusrule", "-l", "release=monitoring")
        assert len(kinds) == 2 and replay.names("deployment"), "and the rebalancer"
    elif " patch raycluster " in line:
        pools = replay.get("raycluster", "mixtral-expertmesh")["spec"]["workerGroupSpecs"]
        assert [(pool["groupName"], pool["maxReplicas"]) for pool in pools] == [("router", 2), ("h100", 8)]
    elif line.startswith("diff "):
        assert printed == ""
    elif line.startswith("helm history "):
        assert [row.split()[0] for row in printed.splitlines()] == ["REVISION", "1", "2", "3", "4", "5"]


def bounds(spec: dict[str, Any], group: str) -> str:
    applications = yaml.safe_load(spec["serveConfigV2"])["applications"]
    (found,) = (one["deployments"] for one in applications if one["name"] == f"experts-{group}")
    scaling = found[0]["autoscaling_config"]
    return f"{scaling['min_replicas']}-{scaling['max_replicas']}"
