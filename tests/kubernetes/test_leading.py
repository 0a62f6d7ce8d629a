"""The rebalancer as its pods run it: with the chart's rights alone, and one of them at a time."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay_stand_in import RayServiceObject, admin
from kubernetes import client
from kubernetes_testbed import ApiServer
from mesh import running_directory
from serve_configs import manifest
from test_changes import BEFORE, QUICK, announce
from test_ray_services import with_token

from expertmesh.kubernetes.connection import Connection
from expertmesh.kubernetes.controlled import ControlledService, lead
from expertmesh.kubernetes.groups import check_covers, read_group
from expertmesh.kubernetes.lease import Candidate, Times
from expertmesh.kubernetes.ray_services import RayServices
from expertmesh.kubernetes.serve_text import group_applications, read_groups
from expertmesh.rebalance.decision import Limits
from expertmesh.rebalance.watch import Controller, Report
from tools.chart.helm import CHART, objects, template

pytestmark = pytest.mark.kubernetes
ACCOUNT = "mesh-expertmesh-rebalancer"
SERVICE = "mesh-expertmesh"
TIMES = Times(lease_s=3, renew_s=2, retry_s=0.3)
RIGHTS = ("ServiceAccount", "Role", "RoleBinding")


@dataclasses.dataclass(frozen=True)
class Pod:
    """What a pod of the rebalancer's Deployment has: its account's connection, its arguments and its probe."""

    connection: Connection
    arguments: dict[str, str]
    probe: list[str]

    def service(self, directory: str) -> ControlledService:
        services = RayServices(self.connection)
        return ControlledService(
            services, self.arguments["--name"], directory, Path("/artifact"), manifest(), QUICK, lambda _: None
        )

    def candidate(self, identity: str) -> Candidate:
        return Candidate(self.connection, self.connection.namespace, self.arguments["--lease"], identity, TIMES)


@pytest.fixture
def pod(api_server: ApiServer, namespace: str, tmp_path: Path) -> Pod:
    rendered = objects(
        template(
            CHART / "ci" / "cpu-values.yaml",
            release="mesh",
            namespace=namespace,
            settings={"rebalancer.enabled": "true"},
        )
    )
    rights = [one for one in rendered if one["kind"] in RIGHTS and one["metadata"]["name"] == ACCOUNT]
    assert [one["kind"] for one in rights] == list(RIGHTS)
    api_server.kubectl("create", "-f", "-", stdin=yaml.safe_dump_all(rights))
    (deployment,) = (one for one in rendered if one["kind"] == "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    assert spec["serviceAccountName"] == ACCOUNT
    (container,) = spec["containers"]
    core = client.CoreV1Api(admin(api_server, namespace).api)
    asked = {"spec": {"audiences": ["https://kubernetes.default.svc"], "expirationSeconds": 3600}}
    token = str(core.create_namespaced_service_account_token(ACCOUNT, namespace, asked).status.token)
    arguments = dict(one.split("=", 1) for one in container["args"])
    probe = container["livenessProbe"]["exec"]["command"]
    return Pod(with_token(api_server, namespace, token, tmp_path), arguments, probe)


@pytest.fixture
def service(api_server: ApiServer, namespace: str) -> RayServiceObject:
    made = RayServiceObject(admin(api_server, namespace), SERVICE)
    made.create()
    return made


@pytest.fixture
def directory() -> Iterator[str]:
    """It has seen loads that ask for other groups."""
    with running_directory() as made:
        for number in range(4):
            announce(made, rows=1000 * (number + 1))
            time.sleep(3.1)  # a slice of the directory's window
        yield made


class Enough(Exception):
    """Ends what would go on for ever."""


def reports(pod: Pod, directory: str, identity: str, many: int) -> tuple[threading.Thread, list[Report], list[float]]:
    """A candidate that leads, with its reports as they come and the times of its beats."""
    told: list[Report] = []
    beats: list[float] = []
    controller = Controller(Limits(threshold=0.0, cool_down_s=600, min_rows=100), window_s=60, observe=False)

    def tell(report: Report) -> None:
        told.append(report)
        if len(told) == many:
            raise Enough

    def run() -> None:
        try:
            service, candidate = pod.service(directory), pod.candidate(identity)
            lead(service, controller, candidate, 1, tell, lambda: beats.append(time.monotonic()))
        except Enough:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, told, beats


def holder(service: RayServiceObject) -> str:
    leases = client.CoordinationV1Api(service.connection.api)
    found: Any = leases.read_namespaced_lease(ACCOUNT, service.connection.namespace)
    return str(found.spec.holder_identity or "")


def seize(service: RayServiceObject, identity: str) -> None:
    """As a candidate that takes the leader for dead."""
    leases = client.CoordinationV1Api(service.connection.api)
    leases.patch_namespaced_lease(
        ACCOUNT, service.connection.namespace, {"spec": {"holderIdentity": identity, "leaseDurationSeconds": 3}}
    )


def wait_for_new_groups(service: RayServiceObject) -> frozenset[str]:
    """The groups, as soon as there are others than before."""
    deadline = time.monotonic() + 30
    while (found := frozenset(read_groups(service.text))) == BEFORE.keys():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_its_account_suffices(pod: Pod, service: RayServiceObject, directory: str) -> None:
    """To lead, to look, to apply and to give the Lease back."""
    with service.operated():
        thread, told, beats = reports(pod, directory, "pod-1", many=2)
        thread.join(60)
    assert [one.action for one in told] == ["applied", "wait"], told
    assert read_groups(service.text).keys() != BEFORE.keys()
    assert holder(service) == ""
    assert len(beats) >= 4, "at the attempt to lead, while it waits for groups, and after each look"


def test_a_leader_that_was_replaced_writes_nothing_more(pod: Pod, service: RayServiceObject, directory: str) -> None:
    """In the middle of a rebalance: neither the next step nor a roll-back. The next leader goes on from there."""
    with service.operated(leaving_s=4):
        first, told, _ = reports(pod, directory, "pod-1", many=1)
        assert wait_for_new_groups(service) > BEFORE.keys()
        grown = service.text
        seize(service, "pod-2")
        first.join(60)
        (report,) = told
        assert report.action == "failed"
        assert report.reason.endswith("this process leads no more; left as it is"), report
        time.sleep(5)  # the new groups run by now
        assert service.text == grown
        assert holder(service) == "pod-2", "it was not given back by one who no longer had it"
        second, told, _ = reports(pod, directory, "pod-2", many=1)
        second.join(120)
    assert [one.action for one in told] == ["applied"], told
    left = [read_group(one) for one in group_applications(service.text).values()]
    assert {group.name for group in left}.isdisjoint(BEFORE)
    check_covers(left, manifest())


def test_a_process_that_is_told_to_go(
    api_server: ApiServer, pod: Pod, service: RayServiceObject, tmp_path: Path
) -> None:
    """The command of the Deployment, up to the connection: it beats, gives the Lease back and ends."""
    (tmp_path / "manifest.json").write_text(manifest().model_dump_json())
    beat = tmp_path / "heartbeat"
    here = {"--artifact": str(tmp_path), "--directory": "127.0.0.1:1", "--heartbeat": str(beat)}
    given = [f"{name}={value}" for name, value in (pod.arguments | here).items() if not name.startswith("--tls")]
    command = [sys.executable, "-m", "expertmesh", "kubernetes", "rebalance", "--watch", *given, "--context=admin"]
    with subprocess.Popen(command, env=api_server.environment, text=True, stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout is not None
            first = running.stdout.readline()
            assert "does not answer" in first, first
            assert holder(service) == socket.gethostname() and beat.exists()
            running.terminate()
            assert running.wait(30) == 130
        finally:
            running.kill()
    assert holder(service) == ""


def test_the_probe_tells_a_process_that_hangs(pod: Pod, tmp_path: Path) -> None:
    beat = tmp_path / "heartbeat"
    assert pod.arguments["--heartbeat"] in pod.probe[-1]
    command = [*pod.probe[:-1], pod.probe[-1].replace(pod.arguments["--heartbeat"], str(beat))]

    def alive() -> bool:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    assert not alive(), "it never began"
    beat.touch()
    assert alive()
    long_ago = time.time() - 600
    os.utime(beat, (long_ago, long_ago))
    assert not alive()
