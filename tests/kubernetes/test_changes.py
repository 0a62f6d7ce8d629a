"""Scaling a group, rebalancing and the controller on a real API server, with a stand-in for KubeRay's operator."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from kuberay_stand_in import NAME, RayServiceObject
from kubernetes_testbed import ApiServer
from mesh import running_directory
from serve_configs import FINGERPRINT, manifest

from expertmesh.directory.client import METADATA
from expertmesh.errors import ClusterError
from expertmesh.kubernetes.bounds import Bounds
from expertmesh.kubernetes.controlled import ControlledService
from expertmesh.kubernetes.lease import Candidate, Leadership, Times, run_as_leader
from expertmesh.kubernetes.ray_services import RayServices
from expertmesh.kubernetes.rebalance import Rebalance
from expertmesh.kubernetes.scale import Scaling
from expertmesh.kubernetes.serve_text import read_groups
from expertmesh.kubernetes.transition import propose
from expertmesh.kubernetes.waiting import Patience
from expertmesh.placement.plan import Plan
from expertmesh.rebalance.decision import Limits
from expertmesh.rebalance.watch import Controller
from expertmesh.v1 import directory_pb2, directory_pb2_grpc, expert_pb2

pytestmark = pytest.mark.kubernetes
QUICK = Patience(timeout_s=20, settle_s=0.3)
SPLIT = Plan.model_validate(
    {
        "fingerprint": FINGERPRINT,
        "groups": [{"name": "left", "experts": "0-3"}, {"name": "right", "experts": "4-7", "max_replicas": 3}],
    }
)
BEFORE = {"hot": Bounds(1, 2), "cold": Bounds(1, 1)}
AFTER = {"left": Bounds(1, 1), "right": Bounds(1, 3)}


def run(server: ApiServer, namespace: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "expertmesh", "kubernetes", *arguments, "-n", namespace, "--context", "admin"]
    return subprocess.run(command, env=server.environment, capture_output=True, text=True, timeout=120, check=False)


def test_other_bounds_arrive(services: RayServices, ray_service: RayServiceObject) -> None:
    scaling = Scaling(services, NAME, "hot", Bounds(2, 7), QUICK)
    with ray_service.operated():
        scaling.wait(scaling.patch())
    assert read_groups(ray_service.text) == BEFORE | {"hot": Bounds(2, 7)}


def test_bounds_that_do_not_arrive_are_taken_back(services: RayServices, ray_service: RayServiceObject) -> None:
    before = ray_service.text
    scaling = Scaling(services, NAME, "hot", Bounds(2, 7), QUICK)
    with ray_service.operated(failing="hot"), pytest.raises(ClusterError, match=r"rolled back: the bounds are 1 to 2"):
        scaling.wait(scaling.patch())
    assert ray_service.text == before


def test_who_scales_meanwhile_keeps_what_they_wrote(services: RayServices, ray_service: RayServiceObject) -> None:
    scaling = Scaling(services, NAME, "hot", Bounds(2, 7), QUICK)
    patched = scaling.patch()
    Scaling(services, NAME, "hot", Bounds(3, 3)).patch()
    with ray_service.operated(), pytest.raises(ClusterError, match="others have changed"):
        scaling.wait(patched)
    assert read_groups(ray_service.text)["hot"] == Bounds(3, 3)


def test_new_groups_come_before_old_ones_go(services: RayServices, ray_service: RayServiceObject) -> None:
    seen: list[frozenset[str]] = []
    proposal = propose(ray_service.text, SPLIT)
    rebalance = Rebalance(
        services, NAME, proposal.transition, QUICK, lambda _: seen.append(frozenset(read_groups(ray_service.text)))
    )
    with ray_service.operated():
        rebalance.run()
    assert read_groups(ray_service.text) == AFTER
    assert seen[0] == BEFORE.keys() | AFTER.keys() and seen[-1] == AFTER.keys()


def test_a_group_that_does_not_come_up_takes_all_back(services: RayServices, ray_service: RayServiceObject) -> None:
    before = ray_service.text
    rebalance = Rebalance(services, NAME, propose(before, SPLIT).transition, QUICK)
    with (
        ray_service.operated(failing="right"),
        pytest.raises(ClusterError, match="rolled back: the groups are those from before"),
    ):
        rebalance.run()
    assert ray_service.text == before


def test_the_command_line(api_server: ApiServer, namespace: str, ray_service: RayServiceObject, tmp_path: Path) -> None:
    before = ray_service.text
    dry = run(api_server, namespace, "scale", "hot", "2", "7", "--dry-run")
    assert dry.returncode == 0 and "max_replicas: 7" in dry.stdout + dry.stderr, dry.stderr
    assert ray_service.text == before
    for arguments, why in (
        (("scale", "hto", "1", "2"), "no group 'hto'; the groups are hot, cold"),
        (("scale", "hot", "3", "2"), "2"),
        (("rebalance", str(tmp_path / "none.json"), "--yes"), "no such file"),
    ):
        failed = run(api_server, namespace, *arguments)
        assert failed.returncode != 0 and why in failed.stderr and "Traceback" not in failed.stderr
    with ray_service.operated():
        done = run(api_server, namespace, "scale", "hot", "2", "7", "--settle", "0.3")
        assert done.returncode == 0, done.stderr
        waited = run(api_server, namespace, "wait", "--settle", "0.3", "--timeout", "20")
        assert waited.returncode == 0, waited.stderr
        status = run(api_server, namespace, "status", "--json")
    assert status.returncode == 0, status.stderr
    assert "hot" in json.dumps(json.loads(status.stdout))


def candidate(ray_service: RayServiceObject, name: str) -> Candidate:
    connection = ray_service.connection
    return Candidate(connection, connection.namespace, "controller", name, Times(lease_s=3, renew_s=2, retry_s=0.3))


def test_one_leads_and_the_other_takes_over(ray_service: RayServiceObject) -> None:
    leading: list[str] = []
    first, second = candidate(ray_service, "first"), candidate(ray_service, "second")
    assert first.try_to_lead() and not second.try_to_lead()

    def work(leadership: Leadership) -> str:
        leading.append(second.identity)
        return "done"

    waiting = threading.Thread(target=lambda: leading.append(run_as_leader(second, work)))
    waiting.start()
    for _ in range(4):  # a leader that renews is not replaced
        time.sleep(1)
        assert first.try_to_lead()
    assert leading == []
    waiting.join(30)  # the first one is gone now, and does not renew
    assert leading == ["second", "done"]
    assert first.try_to_lead(), "it was given back"


def announce(directory: str, rows: int) -> None:
    """One replica of each group; expert 0 has had most of the rows."""
    with grpc.insecure_channel(directory) as channel:
        stub = directory_pb2_grpc.DirectoryServiceStub(channel)
        for group, experts in (("hot", range(2)), ("cold", range(2, 8))):
            counts = [rows * (40 if expert == 0 else 1) for expert in experts]
            replica = directory_pb2.Replica(
                replica_id=f"{group}-1",
                group=group,
                address="127.0.0.1:1",
                fingerprint=FINGERPRINT,
                layers=[expert_pb2.LayerExperts(layer=layer, experts=experts) for layer in (0, 1)],
                state=expert_pb2.REPLICA_STATE_READY,
                load=expert_pb2.Load(rows_total=2 * sum(counts), busy=0.5, rows_per_s=sum(counts) / 3),
            )
            told = [directory_pb2.LayerRows(layer=layer, experts=experts, rows=counts) for layer in (0, 1)]
            request = directory_pb2.AnnounceRequest(replica=replica, lease_ms=600_000, expert_rows=told)
            stub.Announce(request, metadata=METADATA)


def test_the_controller_observes_and_applies(services: RayServices, ray_service: RayServiceObject) -> None:
    before = ray_service.text
    with running_directory() as directory:
        for number in range(4):
            announce(directory, rows=1000 * (number + 1))
            time.sleep(3.1)  # a slice of the directory's window
        subject = ControlledService(services, NAME, directory, Path("/artifact"), manifest(), QUICK, lambda _: None)
        limits = Limits(threshold=0.0, cool_down_s=600, min_rows=100)
        seen = Controller(limits, window_s=60, observe=True).look(lambda: subject)
        assert seen.action == "would apply", seen
        assert seen.rows > 0 and seen.groups_changed > 0 and ray_service.text == before
        controller = Controller(limits, window_s=60, observe=False)
        with ray_service.operated():
            assert controller.look(lambda: subject).action == "applied"
        assert read_groups(ray_service.text).keys() != BEFORE.keys()
        assert controller.look(lambda: subject).action == "wait"
