from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from expert_service.metrics import REPLICA_METRICS, ReplicaMetrics
from expertmesh.directory.metrics import DIRECTORY_METRICS, HOTTEST, DirectoryMetrics
from expertmesh.metrics import Exporter, Metric
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import expert_pb2
from router_service.metrics import ROUTER_METRICS, SUSPENSIONS, SuspensionMetrics, follow_suspensions
from router_service.replicas import LiveReplica, LiveReplicas, Suspensions

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
READY = expert_pb2.REPLICA_STATE_READY


class Kept(Exporter):
    """Keeps what would go to Ray."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[str, ...], float] = {}

    @property
    def wanted(self) -> bool:
        return True

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        assert metric.kind == "gauge" and len(labels) == len(metric.labels)
        self.values[metric.name, *labels] = value

    def add(self, metric: Metric, value: float, *labels: str) -> None:
        assert metric.kind == "counter" and len(labels) == len(metric.labels)
        self.values[metric.name, *labels] = self.values.get((metric.name, *labels), 0) + value


def test_the_document_lists_them() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    metrics = (*REPLICA_METRICS, *ROUTER_METRICS, *DIRECTORY_METRICS)
    assert rows == [f"| `{one.name}` | {one.kind} | {', '.join(one.labels)} | {one.meaning} |" for one in metrics]


def test_a_process_without_ray_does_not_load_it() -> None:
    script = (
        "import sys; from expert_service.metrics import ReplicaMetrics; from expertmesh.v1 import expert_pb2;"
        "ReplicaMetrics('g', 'r').publish(expert_pb2.Load(rows_total=5), (1, 2)); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=DOCUMENT.parents[1], check=True, timeout=60)


def test_a_replicas_figures() -> None:
    kept = Kept()
    metrics = ReplicaMetrics("g", "r", kept)
    for rows in (10, 10, 25):
        metrics.publish(expert_pb2.Load(queued_rows=3, busy=0.5, rows_total=rows), (1500, 20_000))
    assert kept.values == {
        ("expertmesh_replica_busy_ratio", "g", "r"): 0.5,
        ("expertmesh_replica_queued_rows", "g", "r"): 3,
        ("expertmesh_replica_rows_total", "g", "r"): 25,
        ("expertmesh_replica_queue_wait_seconds", "g", "r", "0.5"): 0.0015,
        ("expertmesh_replica_queue_wait_seconds", "g", "r", "0.95"): 0.02,
    }


def test_the_directorys_figures_are_few_and_go_to_zero() -> None:
    kept = Kept()
    metrics = DirectoryMetrics(kept)
    load = pb.ExpertLoadReply(
        window_s=60,
        layers=[pb.LayerRows(layer=layer, experts=range(256), rows=range(256)) for layer in range(61)],
        balance=[pb.LayerBalance(layer=layer, balancedness=0.5) for layer in range(61)],
    )
    replicas = [pb.Replica(group="g", state=READY), pb.Replica(group="g", state=READY)]
    last = pb.ScalingDecision(group="g", target=3)
    stalled = pb.ScalingReply(groups=[pb.GroupScaling(last=last, since_success_s=20, stalled=True)])
    metrics.publish(load, replicas, stalled, unix_time=1000)
    assert len(kept.values) == 61 + HOTTEST + 3 + 3
    assert kept.values["expertmesh_hot_expert_rows_per_second", "1"] == 255 / 60
    assert kept.values["expertmesh_group_replicas", "g", "ready"] == 2
    assert kept.values["expertmesh_autoscaler_last_success_timestamp_seconds", "g"] == 980
    assert kept.values["expertmesh_autoscaler_target_replicas", "g"] == 3
    assert kept.values["expertmesh_autoscaler_stalled", "g"] == 1
    metrics.publish(pb.ExpertLoadReply(), [], pb.ScalingReply(), unix_time=1005)
    assert kept.values["expertmesh_hot_expert_rows_per_second", "1"] == 0
    assert kept.values["expertmesh_group_replicas", "g", "ready"] == 0
    assert kept.values["expertmesh_autoscaler_stalled", "g"] == 0


def test_a_routers_figures_go_to_zero_and_are_renewed_while_its_engine_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live, kept = LiveReplicas(), Kept()
    live.add(LiveReplica("a", "g", {0: frozenset({0})}, 100))
    live.add(LiveReplica("b", "h", {0: frozenset({0})}, 100))
    answers: list[Suspensions] = []
    for change in (
        lambda: live.suspend("a", "late", ""),
        lambda: live.resume("a"),
        lambda: live.suspend("a", "error", ""),
    ):
        change()
        answers.append(live.suspensions())
    live.remove("a")
    answers.append(live.suspensions())
    resting, seen = [1, 0, 1, 0], list[float]()

    async def ask(what: str) -> list[Suspensions]:
        assert what == SUSPENSIONS
        if len(seen) == len(answers):
            kept.values.pop(("expertmesh_router_suspended_replicas", "g"))
            while ("expertmesh_router_suspended_replicas", "g") not in kept.values:
                await asyncio.sleep(0)
            raise EOFError
        seen.append(kept.values.get(("expertmesh_router_suspended_replicas", "g"), -1))
        return [answers[len(seen) - 1]]

    monkeypatch.setattr("router_service.metrics.EVERY_S", 0.001)
    with pytest.raises(EOFError):
        asyncio.run(follow_suspensions(ask, SuspensionMetrics(kept)))
    assert seen == [-1, *resting[:-1]]
    assert kept.values == {
        ("expertmesh_router_suspended_replicas", "g"): 0,
        ("expertmesh_router_suspended_replicas", "h"): 0,
        ("expertmesh_router_suspensions_total", "g", "late"): 1,
        ("expertmesh_router_suspensions_total", "g", "error"): 1,
    }
