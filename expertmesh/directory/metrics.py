"""What the directory tells Prometheus: few series, however many experts there are. Its query has the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from expertmesh.metrics import Exporter, Metric
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import expert_pb2

EVERY_S = 5.0
WINDOW_S = 60.0
HOTTEST = 10
STATES = {
    expert_pb2.REPLICA_STATE_STARTING: "starting",
    expert_pb2.REPLICA_STATE_READY: "ready",
    expert_pb2.REPLICA_STATE_DRAINING: "draining",
}

BALANCEDNESS = Metric(
    "expertmesh_layer_balancedness",
    "gauge",
    ("layer",),
    "Mean over largest of the rows that each replica got in the layer, over the last minute, 0 to 1; 1: even.",
)
HOT = Metric(
    "expertmesh_hot_expert_rows_per_second",
    "gauge",
    ("rank",),
    "Rows per second of the experts that got most over the last minute; rank 1 to 10.",
)
REPLICAS = Metric(
    "expertmesh_group_replicas",
    "gauge",
    ("group", "state"),
    "Replicas in the directory; state starting, ready or draining.",
)
LAST_SUCCESS = Metric(
    "expertmesh_autoscaler_last_success_timestamp_seconds",
    "gauge",
    ("group",),
    "Unix time when the autoscaler last came to a decision for the group.",
)
TARGET = Metric("expertmesh_autoscaler_target_replicas", "gauge", ("group",), "Replicas that it wanted then.")
STALLED = Metric(
    "expertmesh_autoscaler_stalled",
    "gauge",
    ("group",),
    "1 where the autoscaler has been silent or failing for the group for too long, else 0.",
)
DIRECTORY_METRICS = (BALANCEDNESS, HOT, REPLICAS, LAST_SUCCESS, TARGET, STALLED)


class DirectoryMetrics:
    def __init__(self, exporter: Exporter | None = None) -> None:
        self._exporter = exporter or Exporter()
        self._groups: set[str] = set()
        """Those told of so far; a gauge keeps its value until it gets another."""
        self._stalled: set[str] = set()

    def publish(
        self,
        load: pb.ExpertLoadReply,
        replicas: Iterable[pb.Replica],
        scaling: pb.ScalingReply,
        unix_time: float,
    ) -> None:
        """`load` over `WINDOW_S`. Does nothing where nobody listens."""
        exporter = self._exporter
        if not exporter.wanted:
            return
        for balance in load.balance:
            exporter.set(BALANCEDNESS, balance.balancedness, str(balance.layer))
        for rank, rows_per_s in enumerate(hottest(load), 1):
            exporter.set(HOT, rows_per_s, str(rank))
        counts = Counter((one.group, one.state) for one in replicas)
        self._groups |= {group for group, _ in counts}
        for group in self._groups:
            for state, name in STATES.items():
                exporter.set(REPLICAS, counts[group, state], group, name)
        for one in scaling.groups:
            if one.since_success_s >= 0:
                exporter.set(LAST_SUCCESS, unix_time - one.since_success_s, one.last.group)
            exporter.set(TARGET, one.last.target, one.last.group)
            exporter.set(STALLED, float(one.stalled), one.last.group)
        known = {one.last.group for one in scaling.groups}
        for group in self._stalled - known:
            exporter.set(STALLED, 0, group)
        self._stalled = {one.last.group for one in scaling.groups if one.stalled}


def hottest(load: pb.ExpertLoadReply) -> list[float]:
    """Rows per second of the experts that got most, in falling order; 0 where there are fewer."""
    rows = sorted((rows for layer in load.layers for rows in layer.rows), reverse=True)[:HOTTEST]
    return [count / max(load.window_s, 1.0) for count in rows] + [0.0] * (HOTTEST - len(rows))
