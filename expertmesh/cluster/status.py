"""What runs: the directory's table joined with what Ray Serve says."""

from __future__ import annotations

import math
from collections import Counter

import pydantic

from expertmesh.args import DIRECTORY_APPLICATION, ROUTER_APPLICATION, experts_application
from expertmesh.cluster.readiness import ready_replicas, target_replicas
from expertmesh.cluster.record import Record
from expertmesh.cluster.serve_api import Details
from expertmesh.experts import format_indices
from expertmesh.v1 import directory_pb2, expert_pb2

STATES = {
    expert_pb2.REPLICA_STATE_STARTING: "starting",
    expert_pb2.REPLICA_STATE_READY: "ready",
    expert_pb2.REPLICA_STATE_DRAINING: "draining",
}
ABSENT = "ABSENT"
"""Status of an application that Ray Serve does not know."""


class Value(pydantic.BaseModel, frozen=True):
    pass


class ReplicaStatus(Value):
    """As the directory has it."""

    replica_id: str
    address: str
    state: str
    pid: int
    rows_total: int
    rows_per_s: float
    busy: float
    queued_rows: int
    queue_wait_p50_ms: float
    queue_wait_p95_ms: float
    """Over the last 5 s or so."""
    expert_bytes: int


class ApplicationStatus(Value):
    """As Ray Serve has it, over all deployments of the application."""

    application: str
    status: str
    running: int
    target: int


class DecisionStatus(Value):
    """Of the autoscaler, for one group. What was not known is None."""

    decided_at: float
    """Unix time, seconds."""
    target_before: int
    target: int
    asked: int
    busy: float | None
    queue_wait_ms: float | None
    reason: str
    error: str


class ScalingStatus(Value):
    """A group that scales."""

    min_replicas: int
    max_replicas: int
    last: DecisionStatus
    changes: list[DecisionStatus]
    """The last ones that changed the target, newest last."""
    since_success_s: float | None
    """None: no decision has succeeded since the directory began."""
    stalled: bool
    """The autoscaler has been silent or failing for too long."""


class GroupStatus(Value):
    name: str
    serve: ApplicationStatus
    ready: int
    """Replicas that the directory holds ready."""
    agree: bool
    """Whether Ray Serve runs as many replicas as the directory holds, all ready."""
    experts: dict[int, str]
    """MoE layer -> indices."""
    rows_total: int
    rows_per_s: float
    busy: float
    """Mean over the replicas, 0 to 1."""
    queued_rows: int
    queue_wait_p95_ms: float
    """Of the replica where rows wait longest."""
    scaling: ScalingStatus | None
    """None where the autoscaler has not spoken of it."""
    replicas: list[ReplicaStatus]


class ClusterStatus(Value):
    name: str
    model: str
    api: str
    dashboard: str
    directory: ApplicationStatus
    directory_version: int
    settling: bool
    router: ApplicationStatus
    groups: list[GroupStatus]


def join(
    cluster: Record, details: Details, table: directory_pb2.Table, scaling: directory_pb2.ScalingReply | None = None
) -> ClusterStatus:
    """Every group that Ray Serve or the directory knows, by name."""
    decisions = {one.last.group: one for one in scaling.groups} if scaling else {}
    prefix = experts_application("")
    names = {name.removeprefix(prefix) for name in details.get("applications", {}) if name.startswith(prefix)}
    names |= {replica.group for replica in table.replicas}
    return ClusterStatus(
        name=cluster.name,
        model=cluster.model,
        api=f"{cluster.http}/v1",
        dashboard=cluster.dashboard,
        directory=_application(DIRECTORY_APPLICATION, details),
        directory_version=table.version,
        settling=table.settling,
        router=_application(ROUTER_APPLICATION, details),
        groups=[_group(name, details, table, decisions.get(name)) for name in sorted(names)],
    )


def describe_experts(experts: dict[int, str]) -> str:
    """{0: "0-3", 1: "0-3"} -> "0-3 in layers 0-1"; the layers with other experts follow."""
    layers: dict[str, set[int]] = {}
    for layer, indices in experts.items():
        layers.setdefault(indices, set()).add(layer)
    return "; ".join(f"{indices} in layers {format_indices(of)}" for indices, of in layers.items())


def _application(name: str, details: Details) -> ApplicationStatus:
    found = details.get("applications", {}).get(name, {})
    deployments = found.get("deployments", {}).values()
    states = Counter(replica["state"] for deployment in deployments for replica in deployment.get("replicas", []))
    target = sum(map(target_replicas, deployments))
    status = found.get("status", ABSENT)
    return ApplicationStatus(application=name, status=status, running=states["RUNNING"], target=target)


def _group(
    name: str, details: Details, table: directory_pb2.Table, scaling: directory_pb2.GroupScaling | None
) -> GroupStatus:
    serve = _application(experts_application(name), details)
    replicas = [_replica(one) for one in table.replicas if one.group == name]
    ready = ready_replicas(table, name)
    first = next((one for one in table.replicas if one.group == name), None)
    return GroupStatus(
        name=name,
        serve=serve,
        ready=ready,
        agree=serve.running == ready == len(replicas),
        experts={layer.layer: format_indices(set(layer.experts)) for layer in first.layers} if first else {},
        rows_total=sum(one.rows_total for one in replicas),
        rows_per_s=sum(one.rows_per_s for one in replicas),
        busy=sum(one.busy for one in replicas) / max(1, len(replicas)),
        queued_rows=sum(one.queued_rows for one in replicas),
        queue_wait_p95_ms=max((one.queue_wait_p95_ms for one in replicas), default=0.0),
        scaling=_scaling(scaling) if scaling else None,
        replicas=replicas,
    )


def _replica(replica: directory_pb2.Replica) -> ReplicaStatus:
    return ReplicaStatus(
        replica_id=replica.replica_id,
        address=replica.address,
        state=STATES.get(replica.state, "unspecified"),
        pid=replica.pid,
        rows_total=replica.load.rows_total,
        rows_per_s=round(replica.load.rows_per_s, 1),
        busy=round(replica.load.busy, 3),
        queued_rows=replica.load.queued_rows,
        queue_wait_p50_ms=replica.queue_wait.p50_us / 1000,
        queue_wait_p95_ms=replica.queue_wait.p95_us / 1000,
        expert_bytes=replica.expert_bytes,
    )


def _scaling(scaling: directory_pb2.GroupScaling) -> ScalingStatus:
    return ScalingStatus(
        min_replicas=scaling.last.min_replicas,
        max_replicas=scaling.last.max_replicas,
        last=_decision(scaling.last),
        changes=[_decision(one) for one in scaling.changes],
        since_success_s=round(scaling.since_success_s, 1) if scaling.since_success_s >= 0 else None,
        stalled=scaling.stalled,
    )


def _decision(decision: directory_pb2.ScalingDecision) -> DecisionStatus:
    return DecisionStatus(
        decided_at=decision.decided_at,
        target_before=decision.target_before,
        target=decision.target,
        asked=decision.asked,
        busy=_known(decision.busy, 3),
        queue_wait_ms=_known(decision.queue_wait_ms, 1),
        reason=decision.reason,
        error=decision.error,
    )


def _known(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None
