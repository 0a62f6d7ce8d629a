"""The directory's table joined with Ray Serve's details, and where they differ."""

from __future__ import annotations

from typing import Any

from expertmesh.cluster.readiness import steps
from expertmesh.cluster.record import Record
from expertmesh.cluster.status import describe_experts, join
from expertmesh.v1 import directory_pb2, expert_pb2

RECORD = Record(
    name="c",
    config="c.yaml",
    dashboard="http://127.0.0.1:1",
    http="http://127.0.0.1:2",
    directory="127.0.0.1:3",
    model="m",
)


def replica(group: str, number: int, *, state: int = expert_pb2.REPLICA_STATE_READY) -> directory_pb2.Replica:
    return directory_pb2.Replica(
        replica_id=f"{group}-{number}",
        group=group,
        address=f"127.0.0.1:{5000 + number}",
        layers=[expert_pb2.LayerExperts(layer=layer, experts=[0, 1, 2, 5]) for layer in (1, 2)],
        state=state,  # type: ignore[arg-type]
        load=expert_pb2.Load(rows_total=100 * number, rows_per_s=10, busy=0.25 * number, queued_rows=number),
    )


def application(running: int, target: int, status: str = "RUNNING", message: str = "") -> dict[str, Any]:
    replicas = [{"state": "RUNNING"}] * running + [{"state": "STARTING"}] * (target - running)
    deployment = {"replicas": replicas, "target_num_replicas": target, "message": message}
    return {"status": status, "message": "", "deployments": {"ExpertReplica": deployment}}


def table(*replicas: directory_pb2.Replica) -> directory_pb2.Table:
    return directory_pb2.Table(directory_id="d", version=7, replicas=replicas)


def test_a_group_that_both_agree_on() -> None:
    details = {"applications": {"experts-a": application(2, 2), "router": application(1, 1)}}
    found = join(RECORD, details, table(replica("a", 1), replica("a", 2)))
    (group,) = found.groups
    assert (group.name, group.ready, group.serve.running, group.serve.target, group.agree) == ("a", 2, 2, 2, True)
    assert (group.rows_total, group.rows_per_s, group.busy, group.queued_rows) == (300, 20.0, 0.375, 3)
    assert group.experts == {1: "0-2,5", 2: "0-2,5"}
    assert found.router.status == "RUNNING"
    assert found.directory.status == "ABSENT"
    assert found.api == "http://127.0.0.1:2/v1"


def test_groups_that_they_do_not_agree_on() -> None:
    draining = replica("c", 3, state=expert_pb2.REPLICA_STATE_DRAINING)
    details = {"applications": {"experts-a": application(1, 2), "experts-c": application(1, 1)}}
    found = {group.name: group for group in join(RECORD, details, table(replica("b", 1), draining)).groups}
    assert list(found) == ["a", "b", "c"]
    assert not any(group.agree for group in found.values())
    assert (found["a"].ready, found["a"].serve.running) == (0, 1)
    assert (found["b"].ready, found["b"].serve.status) == (1, "ABSENT")
    assert (found["c"].ready, found["c"].replicas[0].state) == (0, "draining")


def test_experts_in_words() -> None:
    assert describe_experts({1: "0-3", 2: "0-3", 4: "7"}) == "0-3 in layers 1-2; 7 in layers 4"
    assert describe_experts({}) == ""


def test_up_waits_for_the_directory_too() -> None:
    details = {"applications": {"experts-a": application(1, 1)}}
    (waiting,) = steps({"experts-a": "a"}, details, table())
    assert not waiting.done
    (ready,) = steps({"experts-a": "a"}, details, table(replica("a", 1)))
    assert ready.done
    (away,) = steps({"experts-a": "a"}, details, None)
    assert not away.done


def test_a_failed_application_says_why_in_one_line() -> None:
    trace = "A replica failed.\nTraceback (most recent call last):\n  File x\nValueError: no weights in layer 3\n\nmore"
    details = {"applications": {"experts-a": application(0, 1, "DEPLOY_FAILED", trace)}}
    (failed,) = steps({"experts-a": "a"}, details, table())
    assert failed.error == "ValueError: no weights in layer 3"


def test_an_application_that_serve_does_not_know_yet() -> None:
    (step,) = steps({"router": None}, {}, table())
    assert (step.status, step.done, step.error) == ("NOT_STARTED", False, "")
