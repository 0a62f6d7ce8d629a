"""Every decision in the log with what it rests on, and in the directory."""

from __future__ import annotations

import logging
import math
import time

from expertmesh.scaling.decision_reports import reports_to
from expertmesh.scaling.policy import Bounds, Decision, GroupLoad, ReplicaLoad
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.wire.tls import TlsFiles

logger = logging.getLogger("ray.serve.expertmesh.scaling")
"""Below Ray Serve's own, so that the lines come in the controller's log."""
EVERY_S = 1.0
MAX_REPLICAS_LOGGED = 16


class DecisionLog:
    """Of one group: a line at INFO where the target changes and at DEBUG otherwise; the directory is told of a change
    at once and otherwise once a second. Never waits and never raises."""

    def __init__(self, group: str, directory: str | None, tls: TlsFiles | None = None) -> None:
        self._group = group
        self._reports = reports_to(directory, tls) if directory else None
        self._last = pb.ScalingDecision(group=group, busy=math.nan, queue_wait_ms=math.nan)
        self._told_at = -math.inf
        self._error = ""

    def decided(self, load: GroupLoad, bounds: Bounds, decision: Decision) -> None:
        changed = decision.replicas != load.target
        level = logging.INFO if changed else logging.DEBUG
        if logger.isEnabledFor(level):
            logger.log(level, "%s", describe(self._group, load, decision))
        self._last = pb.ScalingDecision(
            group=self._group,
            decided_at=time.time(),
            running=load.running,
            target_before=load.target,
            asked=decision.asked,
            target=decision.replicas,
            busy=decision.busy,
            queue_wait_ms=decision.queue_wait_ms,
            counted=decision.counted,
            reason=decision.reason,
            min_replicas=bounds.min_replicas,
            max_replicas=bounds.max_replicas,
        )
        self._tell(self._last, decision.reason if decision.blind else "", changed)

    def failed(self, error: str) -> None:
        """No decision could be made; `error` is one line."""
        self._tell(self._last, error, False)

    def _tell(self, decision: pb.ScalingDecision, error: str, changed: bool) -> None:
        line = error.splitlines()[0] if error else ""
        if line and line != self._error:
            logger.warning("group %s: no decision, replicas stay as they are: %s", self._group, line)
        appeared = bool(line) != bool(self._error)
        self._error = line
        now = time.monotonic()
        if self._reports is None or not (changed or appeared or now - self._told_at >= EVERY_S):
            return
        self._told_at = now
        report = pb.ScalingDecision()
        report.CopyFrom(decision)
        report.error = line
        if line:
            report.decided_at = time.time()
        self._reports.put(report)


def describe(group: str, load: GroupLoad, decision: Decision) -> str:
    """One line: what was decided, why, and what each replica reported."""
    reports = [_report(one) for one in load.replicas[:MAX_REPLICAS_LOGGED]]
    more = len(load.replicas) - len(reports)
    return (
        f"group {group}: {load.target} -> {decision.replicas} replicas; {decision.reason}; asked {decision.asked}, "
        f"running {load.running}, {decision.counted} reports count: {', '.join(reports) or 'none'}"
        f"{f' and {more} more' if more else ''}"
    )


def _report(one: ReplicaLoad) -> str:
    return (
        f"{one.replica} busy {one.busy:.2f} wait {one.queue_wait_ms:.1f} ms {one.rows_per_s:.1f} rows/s "
        f"{one.queued_rows:g} queued, {one.age_s:.1f} s ago"
    )
