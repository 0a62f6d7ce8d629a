"""The directory's table joined with Ray Serve's details, and where they differ."""

from __future__ import annotations

import math
from typing import Any

from expertmesh.cluster.hottest import top_of
from expertmesh.cluster.readiness import steps
from expertmesh.cluster.record import Record
from expertmesh.cluster.status import describe_experts, join
from expertmesh.commands.status import scaling_lines
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


def test_what_the_autoscaler_decided_and_where_it_is_stalled() -> None:
    decided = directory_pb2.ScalingDecision(
        group="a", decided_at=100, target_before=2, target=3, asked=4, busy=0.7104, queue_wait_ms=math.nan,
        reason="busy 71% of 60%", min_replicas=1, max_replicas=8,
    )  # fmt: skip
    failed = directory_pb2.ScalingDecision(
        group="b", decided_at=101, target=1, error="ZeroDivisionError", max_replicas=2
    )
    scaling = directory_pb2.ScalingReply(
        groups=[
            directory_pb2.GroupScaling(last=decided, changes=[decided], since_success_s=2),
            directory_pb2.GroupScaling(last=failed, since_success_s=-1, stalled=True),
        ]
    )
    details = {"applications": {f"experts-{name}": application(1, 1) for name in "abc"}}
    found = join(RECORD, details, table(replica("a", 1)), scaling)
    a, b, c = found.groups
    assert a.scaling is not None and a.scaling.changes == [a.scaling.last]
    assert (a.scaling.last.busy, a.scaling.last.queue_wait_ms, a.scaling.since_success_s) == (0.71, None, 2)
    assert b.scaling is not None and b.scaling.since_success_s is None and b.scaling.stalled and c.scaling is None
    assert "NaN" not in found.model_dump_json()
    assert scaling_lines(found, now=102) == [
        "group a: 3 replicas wanted (1-8); 2 s ago: busy 71% of 60%",
        "group b: 1 replicas wanted (0-2); 1 s ago: no decision: ZeroDivisionError",
        "! group b: the autoscaler is stalled, no decision has succeeded ever",
    ]


def test_queue_wait_of_a_group_is_that_of_its_slowest_replica() -> None:
    one, other = replica("a", 1), replica("a", 2)
    one.queue_wait.p95_us, other.queue_wait.p95_us, other.queue_wait.p50_us = 1500, 20_000, 3000
    (group,) = join(RECORD, {}, table(one, other)).groups
    assert group.queue_wait_p95_ms == 20 and [r.queue_wait_p50_ms for r in group.replicas] == [0, 3]


def test_hot_experts_and_uneven_layers_come_first() -> None:
    load = directory_pb2.ExpertLoadReply(
        window_s=10,
        layers=[
            directory_pb2.LayerRows(layer=0, experts=[0, 1], rows=[30, 10]),
            directory_pb2.LayerRows(layer=1, experts=[4, 9], rows=[100, 0]),
            directory_pb2.LayerRows(layer=2, experts=[0], rows=[0]),
        ],
        balance=[directory_pb2.LayerBalance(layer=layer, balancedness=even) for layer, even in ((0, 0.9), (1, 0.5))],
    )
    found = top_of(join(RECORD, {}, table()), load, most=2)
    assert [(one.layer, one.expert, one.rows_per_s, one.share) for one in found.experts] == [
        (1, 4, 10, 1),
        (0, 0, 3, 0.75),
    ]
    assert [(one.layer, one.rows_per_s, one.balancedness) for one in found.layers] == [
        (1, 10, 0.5), (0, 4, 0.9), (2, 0, None),
    ]  # fmt: skip


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
