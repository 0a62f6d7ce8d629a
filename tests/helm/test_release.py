"""A release on a real API server with KubeRay's CRDs: install, upgrade, roll back, uninstall, and who may do what."""

from __future__ import annotations

import base64
import copy
import difflib
import itertools
import json
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from kubernetes_testbed import ApiServer, tool
from test_guide import commands
from test_refusals import PLACED, UNFIT, WRONG, assert_named, at, write
from test_serve_config import merged

from expertmesh.api_keys import admits, parse
from tools.chart.helm import CHART

pytestmark = pytest.mark.kubernetes

CPU = CHART / "ci" / "cpu-values.yaml"
NAME = "demo-expertmesh"
OLD_SERVER = ("--set", "podDisruptionBudget.enabled=false")
"""The API server is of Kubernetes 1.20: it has no policy/v1, and ports of its network policies have no `endPort`."""
Get = Callable[..., Any]


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart without its demand for Kubernetes 1.27, and what of it such a server does not know."""
    copy = tmp_path_factory.mktemp("chart") / "expertmesh"
    shutil.copytree(CHART, copy)
    description = (copy / "Chart.yaml").read_text()
    (copy / "Chart.yaml").write_text(re.sub(r"(?m)^kubeVersion: .*\n", "", description))
    policies = copy / "templates" / "networkpolicies.yaml"
    policies.write_text(re.sub(r", endPort: \{\{.*?\}\}", "", policies.read_text()))
    return copy


class Release:
    """Helm's commands on one release in one namespace."""

    def __init__(self, server: ApiServer, namespace: str, chart: Path) -> None:
        self.server, self.namespace, self.chart = server, namespace, chart

    def install(self, *arguments: str) -> str:
        return self._apply("install", *arguments)

    def upgrade(self, *arguments: str) -> str:
        return self._apply("upgrade", *arguments)

    def _apply(self, verb: str, *arguments: str) -> str:
        command = (verb, "demo", str(self.chart), "-n", self.namespace, "-f", str(CPU), *OLD_SERVER, *arguments)
        return self.server.helm(*command)

    def helm(self, verb: str, *arguments: str) -> str:
        return self.server.helm(verb, "demo", *arguments, "-n", self.namespace)

    def manifest(self) -> str:
        return self.server.helm("get", "manifest", "demo", "-n", self.namespace)

    def get(self, kind: str, name: str) -> Any:
        return json.loads(self.server.kubectl("get", kind, name, "-n", self.namespace, "-o", "json"))

    def names(self, kind: str) -> list[str]:
        listed = json.loads(self.server.kubectl("get", kind, "-n", self.namespace, "-o", "json"))["items"]
        return [one["metadata"]["name"] for one in listed]


@pytest.fixture
def release(api_server: ApiServer, namespace: str, chart: Path) -> Release:
    return Release(api_server, namespace, chart)


def test_install_upgrade_roll_back_uninstall(release: Release) -> None:
    said = release.install()
    assert "helm -n" in said
    first = release.get("rayservice", NAME)
    assert yaml.safe_load(first["spec"]["serveConfigV2"])["applications"]
    made = {name: release.get("secret", f"{NAME}-{name}")["data"] for name in ("ray-auth", "api-keys", "tls")}
    before = release.manifest()

    release.upgrade("--set", "cluster.groups[0].max_replicas=5")
    second = release.get("rayservice", NAME)
    assert {name: release.get("secret", f"{NAME}-{name}")["data"] for name in made} == made
    assert changed_lines(before, release.manifest()) == ["-          max_replicas: 2", "+          max_replicas: 5"]
    assert without_serve_config(first) == without_serve_config(second)

    release.helm("rollback", "1")
    assert release.get("rayservice", NAME)["spec"] == first["spec"]
    assert release.manifest() == before

    release.helm("uninstall")
    kinds = ("rayservice", "role", "rolebinding", "networkpolicy", "job")
    assert {kind: release.names(kind) for kind in kinds} == {kind: [] for kind in kinds}
    assert release.names("pvc") == [f"{NAME}-model"], "the model stays"
    release.install()


def changed_lines(before: str, after: str) -> list[str]:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def without_serve_config(service: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in service["spec"].items() if key != "serveConfigV2"}


def test_what_an_upgrade_would_change_is_seen_before(release: Release) -> None:
    """By the guide's command: nothing but the line of values that was changed, not what is generated."""
    release.install()
    (line,) = (one for one in commands() if one.startswith("diff "))
    for theirs, ours in (
        ("mixtral", "demo"),
        ("helm/expertmesh", str(release.chart)),
        ("-n expertmesh", f"-n {release.namespace}"),
        ("-f values.yaml", f"-f {CPU} {' '.join(OLD_SERVER)} $CHANGED"),
    ):
        assert theirs in line
        line = line.replace(theirs, ours)
    seen = []
    for changed in ("", "--set cluster.groups[0].max_replicas=5"):
        path = {"PATH": f"{tool('helm').parent}:/usr/bin:/bin", "CHANGED": changed}
        command = ["bash", "-c", line]
        environment = release.server.environment | path
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        seen.append([one for one in done.stdout.splitlines() if re.match(r"[-+]\s", one)])
        assert done.stderr == ""
    assert seen == [[], ["-          max_replicas: 2", "+          max_replicas: 5"]]


def test_an_appended_pool_is_appended(release: Release) -> None:
    release.install()
    before = release.get("rayservice", NAME)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pool = "expertPools[1]"
    amounts = f"{pool}.resources.requests.cpu=2,{pool}.resources.limits.memory=4Gi"
    release.upgrade("--set", f"{pool}.name=more,{pool}.minReplicas=0,{pool}.maxReplicas=2,{amounts}")
    after = release.get("rayservice", NAME)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert after[: len(before)] == before
    assert [group["groupName"] for group in after] == ["router", "experts", "more"]


def test_a_typo_is_refused_and_nothing_is_installed(release: Release) -> None:
    command = ["install", "demo", release.chart, "-n", release.namespace, "-f", CPU, *OLD_SERVER]
    command += ["--set", "cluster.groups[0].max_replica=3"]
    done = subprocess.run(
        [tool("helm"), *command],
        capture_output=True,
        text=True,
        env=release.server.environment,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    assert "at '/cluster/groups/0': additional properties 'max_replica' not allowed" in done.stderr
    assert release.server.helm("list", "-n", release.namespace, "-q").strip() == ""
    assert release.names("rayservice") == []


@pytest.fixture(scope="module")
def standing(api_server: ApiServer, chart: Path) -> Release:
    """An installed one, which nobody may change."""
    name = f"standing-{secrets.token_hex(4)}"
    api_server.kubectl("create", "namespace", name)
    made = Release(api_server, name, chart)
    made.install()
    return made


def versions(release: Release) -> dict[tuple[str, str], str]:
    """Of all objects, which change with every write, and of Helm's own record among the Secrets."""
    kinds = "rayservice,role,rolebinding,networkpolicy,job,secret,configmap,serviceaccount,pvc,pod,deployment"
    listed = json.loads(release.server.kubectl("get", kinds, "-n", release.namespace, "-o", "json"))["items"]
    return {(one["kind"], one["metadata"]["name"]): one["metadata"]["resourceVersion"] for one in listed}


MISTAKES = {
    "top level": ("expertPool",),
    "nested": ("cluster", "groups", 0, "max_replica"),
    "vLLM's": ("cluster", "engine", "kwargs", "tensor_parallel_sise"),
    "type": ("expertPools", 0, "minReplicas"),
    "range": ("cluster", "server", "http_port"),
    "in a list": ("router", "tolerations", 0, "operator"),
    "Kubernetes' own": ("router", "affinity", "nodeAffinty"),
}


@pytest.mark.parametrize("path", MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_value_leaves_a_release_as_it_is(
    standing: Release, tmp_path: Path, path: tuple[str | int, ...]
) -> None:
    """Nor is it installed; the message has its path."""
    values = merged(CPU)
    values["router"] |= copy.deepcopy(PLACED)
    at(values, path[:-1])[path[-1]] = dict(WRONG)[path]
    for said in refused(standing, "-f", str(write(tmp_path, values))):
        assert_named(path, said)


DO_NOT_FIT = ("cluster.groups[0].min_replicas", "expertPools[0].name", "pods.drainSeconds", "tls.mode")


@pytest.mark.parametrize("key", DO_NOT_FIT)
def test_values_that_do_not_fit_leave_a_release_as_it_is(standing: Release, key: str) -> None:
    settings, message = next((settings, message) for settings, message in UNFIT if key in settings)
    given = [part for setting, value in settings.items() for part in ("--set", f"{setting}={value}")]
    for said in refused(standing, *given):
        assert message in said.replace('\\"', '"')


def refused(standing: Release, *arguments: str) -> list[str]:
    """What helm says, with these values, of a new release on the server and of an upgrade, of which nothing comes."""
    before = versions(standing)
    assert len(before) > 10
    said = []
    for verb, name, more in (("install", "other", ["--dry-run=server"]), ("upgrade", "demo", [])):
        command = (verb, name, str(standing.chart), "-n", standing.namespace, "-f", str(CPU), *OLD_SERVER)
        with pytest.raises(AssertionError) as caught:
            standing.server.helm(*command, *more, *arguments)
        said.append(str(caught.value))
    assert versions(standing) == before
    assert [one["status"] for one in json.loads(standing.helm("history", "-o", "json"))] == ["deployed"]
    return said


def test_generated_secrets_hold_what_is_needed(release: Release) -> None:
    release.install()
    held = release.get("secret", f"{NAME}-api-keys")["data"]
    key, lines = (base64.b64decode(held[name]) for name in ("api-key", "keys"))
    (known,) = parse(lines.decode(), "keys")
    assert admits(key, [known.sha256])
    tls = {name: base64.b64decode(text) for name, text in release.get("secret", f"{NAME}-tls")["data"].items()}
    authority, certificate = (x509.load_pem_x509_certificate(tls[name]) for name in ("ca.crt", "tls.crt"))
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [f"{NAME}-experts"]
    assert len(base64.b64decode(release.get("secret", f"{NAME}-ray-auth")["data"]["auth_token"])) == 64


def certificate_of(release: Release) -> tuple[bytes, list[str]]:
    """Its PEM text and the names that it bears."""
    pem = base64.b64decode(release.get("secret", f"{NAME}-tls")["data"]["tls.crt"])
    names = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return pem, names.get_values_for_type(x509.DNSName)


def test_a_generated_certificate_stays_until_it_needs_another_name(release: Release) -> None:
    release.install()
    first = certificate_of(release)
    release.upgrade()
    assert certificate_of(release) == first
    release.upgrade("--set", "tls.serverName=others")
    second = certificate_of(release)
    assert second[1] == ["others"]
    release.upgrade("--set", "tls.serverName=others")
    assert certificate_of(release) == second


ALL = ("create", "get", "list", "watch", "update", "patch", "delete", "deletecollection")
RESOURCES = (
    "pods",
    "pods/log",
    "pods/exec",
    "pods/eviction",
    "secrets",
    "configmaps",
    "services",
    "persistentvolumeclaims",
    "serviceaccounts",
    "events",
    "deployments.apps",
    "jobs.batch",
    "roles.rbac.authorization.k8s.io",
    "rolebindings.rbac.authorization.k8s.io",
    "networkpolicies.networking.k8s.io",
    "rayclusters.ray.io",
    "rayservices.ray.io",
    "leases.coordination.k8s.io",
)
CLUSTER_WIDE = (
    "nodes",
    "namespaces",
    "clusterroles.rbac.authorization.k8s.io",
    "customresourcedefinitions.apiextensions.k8s.io",
)
MAY = {
    f"{NAME}-head": {
        "pods": {"get", "list", "watch"},
        "rayclusters.ray.io": {"get", "patch"},
    },
    f"{NAME}-worker": {},
    f"{NAME}-rebalancer": {
        f"rayservices.ray.io/{NAME}": {"get", "list", "watch", "patch"},
        "leases.coordination.k8s.io": {"create"},
        f"leases.coordination.k8s.io/{NAME}-rebalancer": {"get", "update"},
    },
}


def test_accounts_may_do_what_they_need_and_nothing_more(release: Release) -> None:
    """Every verb on every kind that matters, here, in another namespace and cluster-wide."""
    release.install("--set", "rebalancer.enabled=true")
    asked = 0
    for account, may in MAY.items():
        named = {resource for resource in may if "/" in resource.removeprefix("pods/")}
        for resource in (*RESOURCES, *named):
            allowed = {verb for verb in ALL if can(release, account, verb, resource, release.namespace)}
            asked += len(ALL)
            wanted = set(may.get(resource, ()))
            if resource in named:
                wanted |= set(may.get(resource.rpartition("/")[0], ()))
            assert allowed == wanted, f"{account}: {resource}"
        for resource in RESOURCES:
            assert not any(
                can(release, account, verb, resource, "default") for verb in ("get", "list", "create", "patch")
            )
        for resource in CLUSTER_WIDE:
            assert not any(can(release, account, verb, resource, "") for verb in ("get", "list", "create", "patch"))
    assert asked > 400


def test_all_that_accounts_may_do_is_in_the_table(release: Release) -> None:
    """What `kubectl auth can-i --list` shows, of kinds and verbs that nobody thought of too; but for what every account
    may do, as one without any binding shows."""
    release.install("--set", "rebalancer.enabled=true")
    release.server.kubectl("create", "serviceaccount", "nobody", "-n", release.namespace)
    everyone = rules(release, "nobody")
    reviews = ("selfsubjectaccessreviews", "selfsubjectrulesreviews")
    assert {rule for rule in everyone if not rule.startswith("/")} == {
        f"create {review}.authorization.k8s.io" for review in reviews
    }
    for account, may in MAY.items():
        wanted = {f"{verb} {resource}" for resource, verbs in may.items() for verb in verbs}
        assert rules(release, account) - everyone == wanted, account
        assert everyone <= rules(release, account)
    assert set(MAY) == {*release.names("serviceaccount")} - {"nobody", "default"}, "no account is forgotten"


def rules(release: Release, account: str) -> set[str]:
    """`verb resource.group/name`, and `/path: verb` of what is no resource, as the account itself is told."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": release.namespace},
    }
    answer = ask(release.server, review, as_account=(release.namespace, account))["status"]
    assert not answer["incomplete"]
    found = set()
    for rule in answer["resourceRules"]:
        groups, names = rule.get("apiGroups", [""]), rule.get("resourceNames") or [""]
        for verb, resource, group, name in itertools.product(rule["verbs"], rule["resources"], groups, names):
            found.add(f"{verb} {resource}{group and f'.{group}'}{name and f'/{name}'}")
    for rule in answer["nonResourceRules"]:
        found |= {f"{path}: {verb}" for path in rule["nonResourceURLs"] for verb in rule["verbs"]}
    return found


def can(release: Release, account: str, verb: str, resource: str, namespace: str) -> bool:
    """What `kubectl auth can-i` asks, in one request each."""
    plural, _, rest = resource.partition("/")
    plural, _, group = plural.partition(".")
    attributes = {"verb": verb, "resource": plural, "group": group, "namespace": namespace}
    if rest:
        attributes |= {"subresource": rest} if plural == "pods" else {"name": rest}
    user, groups = identity(release.namespace, account)
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "groups": groups, "resourceAttributes": attributes},
    }
    return bool(ask(release.server, review)["status"]["allowed"])


def identity(namespace: str, account: str) -> tuple[str, list[str]]:
    """User and groups, as the API server takes an account's token for."""
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
    return f"system:serviceaccount:{namespace}:{account}", groups


def ask(server: ApiServer, review: dict[str, Any], as_account: tuple[str, str] | None = None) -> Any:
    """As admin, or as an account (namespace, name) that admin impersonates."""
    import httpx

    config = yaml.safe_load(server.kubeconfig.read_text())
    token = next(user["user"]["token"] for user in config["users"] if user["name"] == "admin")
    headers = [("Authorization", f"Bearer {token}")]
    if as_account is not None:
        user, groups = identity(*as_account)
        headers += [("Impersonate-User", user), *(("Impersonate-Group", group) for group in groups)]
    url = f"{server.url}/apis/authorization.k8s.io/v1/{review['kind'].lower()}s"
    answer = httpx.post(url, json=review, headers=headers, verify=False, trust_env=False)
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_kubectl_agrees(release: Release) -> None:
    release.install()
    head = f"system:serviceaccount:{release.namespace}:{NAME}-head"
    command = ["auth", "can-i", "patch", "rayclusters.ray.io", "-n", release.namespace, "--as", head]
    assert release.server.kubectl(*command).strip() == "yes"
    done = subprocess.run(
        [tool("kubectl"), "auth", "can-i", "get", "secrets", "-n", release.namespace, "--as", head],
        capture_output=True,
        text=True,
        env=release.server.environment,
        check=False,
        timeout=60,
    )
    assert done.stdout.strip() == "no"


def test_an_upgrade_takes_back_what_a_patch_changed(release: Release) -> None:
    """`expertmesh kubernetes scale` owns the field it patched: Helm, which applies on the server, must be told to."""
    release.install()
    first = release.get("rayservice", NAME)["spec"]["serveConfigV2"]
    patched = json.dumps({"spec": {"serveConfigV2": first.replace("max_replicas: 2", "max_replicas: 4", 1)}})
    where = ("-n", release.namespace, "--type", "merge", "--field-manager", "expertmesh", "-p", patched)
    release.server.kubectl("patch", "rayservice", NAME, *where)
    changed = release.get("rayservice", NAME)["spec"]["serveConfigV2"]
    assert changed != first
    with pytest.raises(AssertionError, match=r'conflict with "expertmesh" using ray.io/v1: .spec.serveConfigV2'):
        release.upgrade("--set", "cluster.groups[0].max_replicas=5")
    assert release.get("rayservice", NAME)["spec"]["serveConfigV2"] == changed
    release.upgrade("--set", "cluster.groups[0].max_replicas=5", "--force-conflicts")
    assert "max_replicas: 5" in release.get("rayservice", NAME)["spec"]["serveConfigV2"]
    release.upgrade()
    assert release.get("rayservice", NAME)["spec"]["serveConfigV2"] == first, "it is Helm's again"
    release.server.kubectl("patch", "rayservice", NAME, *where)
    release.helm("rollback", "1", "--force-conflicts")
    assert release.get("rayservice", NAME)["spec"]["serveConfigV2"] == first
