"""What a replica tells Prometheus."""

from __future__ import annotations

from expertmesh.metrics import Exporter, Metric
from expertmesh.v1 import expert_pb2 as pb

EVERY_S = 2.0
LABELS = ("group", "replica")

BUSY = Metric(
    "expertmesh_replica_busy_ratio", "gauge", LABELS, "Share of the last second or so in which it computed, 0 to 1."
)
QUEUED = Metric("expertmesh_replica_queued_rows", "gauge", LABELS, "Rows that wait.")
ROWS = Metric("expertmesh_replica_rows_total", "counter", LABELS, "Rows computed since it began.")
QUEUE_WAIT = Metric(
    "expertmesh_replica_queue_wait_seconds",
    "gauge",
    (*LABELS, "quantile"),
    "How long requests waited in its queue, over the last 5 s; quantile 0.5 or 0.95.",
)
REPLICA_METRICS = (BUSY, QUEUED, ROWS, QUEUE_WAIT)


class ReplicaMetrics:
    def __init__(self, group: str, replica_id: str, exporter: Exporter | None = None) -> None:
        self._labels = group, replica_id
        self._exporter = exporter or Exporter()
        self._rows_told = 0

    def publish(self, load: pb.Load, queue_wait_us: tuple[int, int]) -> None:
        """Does nothing where nobody listens."""
        if not self._exporter.wanted:
            return
        self._exporter.set(BUSY, load.busy, *self._labels)
        self._exporter.set(QUEUED, load.queued_rows, *self._labels)
        self._exporter.add(ROWS, load.rows_total - self._rows_told, *self._labels)
        self._rows_told = load.rows_total
        for quantile, wait_us in zip(("0.5", "0.95"), queue_wait_us, strict=True):
            self._exporter.set(QUEUE_WAIT, wait_us * 1e-6, *self._labels, quantile)
