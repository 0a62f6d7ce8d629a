"""`expertmesh kubernetes logs`, as it is typed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from kuberay_stand_in import PodObject, RayServiceObject
from kubernetes_testbed import ApiServer
from pods_api import NAMESPACE, PODS, PodsApi, pod

COMMAND = (sys.executable, "-m", "expertmesh", "kubernetes", "logs")


class Logs:
    """The command, at an API of three pods that have logged, and of one more."""

    def __init__(self, api: PodsApi, environment: Mapping[str, str]) -> None:
        self.api, self.environment = api, environment
        api.pods = [pod("h", ""), pod("r-1", "router"), pod("e-1", "experts"), pod("o-1", "others")]
        api.logs = {"h": "head up\n", "r-1": "one\n\nthree [3]\n", "e-1": "ready\nrows\n", "o-1": "elsewhere\n"}

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(self.environment, *arguments)


def run(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    api = PodsApi()
    with api.serving() as url:
        kubeconfig = {
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
            "current-context": "x",
        }
        file = tmp_path / "kubeconfig"
        file.write_text(yaml.safe_dump(kubeconfig))
        yield Logs(api, os.environ | {"KUBECONFIG": str(file), "NO_PROXY": "127.0.0.1"})


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (("head",), ["head up"]),
        (("router",), ["one", "", "three [3]"]),
        (("router", "--tail", "1"), ["three [3]"]),
        (("router", "--tail", "0"), []),
        (("experts", "hot"), ["ready", "rows"]),
        (("experts", "hot", "--name", "mesh", "-n", "test"), ["ready", "rows"]),
    ],
    ids=" ".join,
)
def test_one_pod(logs: Logs, arguments: tuple[str, ...], printed: list[str]) -> None:
    done = logs(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == printed


def test_a_line_that_did_not_end_is_printed(logs: Logs) -> None:
    """The last words of a process that was killed."""
    logs.api.logs["h"] = "one\nlast words"
    assert logs("head").stdout == "one\nlast words\n"


def test_several_pods_are_told_apart(logs: Logs) -> None:
    done = logs("experts", "--tail", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["[e-1] rows", "[o-1] elsewhere"]
    assert {query["tailLines"][0] for path, query in logs.api.asked if path.startswith(f"{PODS}/")} == {"1"}


def test_a_pod_that_fails_is_told_and_the_others_are_printed(logs: Logs) -> None:
    del logs.api.logs["o-1"]
    done = logs("experts")
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["[e-1] ready", "[e-1] rows"]
    refused = "not allowed to get pods/log of o-1 in namespace test (403): pods o-1 is forbidden [x]"
    assert done.stderr == f"! {refused}\n"
    del logs.api.logs["e-1"]
    done = logs("experts")
    assert (done.returncode, done.stdout) == (1, "")
    said = done.stderr.splitlines()
    assert sorted(line.partition(" not allowed")[0] for line in said) == ["!", "expertmesh:"]
    assert all(sum(name in line for line in said) == 1 for name in ("of o-1 ", "of e-1 ")), "each is told once"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("routers",), "no role 'routers'; the roles are head, router, experts"),
        (("router", "hot"), "a group goes with the role experts, not with router"),
        (("head", "hot"), "a group goes with the role experts, not with head"),
        (("experts", "hto"), "no group 'hto'; the groups are hot, cold"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else "",
)
def test_what_is_not_there(logs: Logs, arguments: tuple[str, ...], said: str) -> None:
    done = logs(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"expertmesh: {said}\n")


def test_no_pod(logs: Logs) -> None:
    logs.api.pods = [pod("h", "")]
    said = "RayService test/mesh has no experts pod of pool experts, where group hot runs, now"
    done = logs("experts", "hot")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"expertmesh: {said}\n")


def test_lines_are_followed_as_they_come(logs: Logs) -> None:
    command = [*COMMAND, "router", "--follow"]
    with subprocess.Popen(command, env=logs.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            seen = [process.stdout.readline() for _ in range(3)]
            assert process.poll() is None, "the server still holds the answer open"
            logs.api.ended.set()
            assert process.stdout.read() == ""
        except AssertionError:
            process.kill()
            raise
    assert (seen, process.returncode) == (["one\n", "\n", "three [3]\n"], 0)


@pytest.mark.kubernetes
def test_a_real_api_server_without_kubelets_refuses(
    api_server: ApiServer, namespace: str, ray_service: RayServiceObject
) -> None:
    ray_service.report({"router": "RUNNING"})
    PodObject(ray_service.connection, "mesh-waits", "experts").create()
    PodObject(ray_service.connection, "mesh-placed", "router", node="node-1").create()
    for role, said in (
        ("experts", "pod mesh-waits has no log: it is on no node yet"),
        # of the node; Kubernetes 1.20 calls it a pod
        ("router", f'cannot get pods/log of mesh-placed in namespace {namespace}: pods "node-1" not found'),
        ("head", f"RayService {namespace}/mesh has no head pod now"),
    ):
        done = run(api_server.environment, role, "-n", namespace, "--context", "admin")
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"expertmesh: {said}\n")
    refused = run(api_server.environment, "head", "-n", namespace, "--context", "viewer")
    assert (refused.returncode, refused.stdout) == (1, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"expertmesh: not allowed to list rayservices.ray.io in namespace {namespace} (403): ")
