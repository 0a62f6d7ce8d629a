"""A plan for observed loads, beside what the groups that run make of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import ClusterConfig, GroupSection
from expertmesh.placement.capacity import assumed_capacity, modelled_capacity, observed_capacity
from expertmesh.placement.division import evaluate
from expertmesh.placement.groups import held_by
from expertmesh.placement.loads import check_loads, observed_loads
from expertmesh.placement.make import Bounds, propose
from expertmesh.placement.plan import Plan
from expertmesh.placement.planner import Aims, cost
from expertmesh.rebalance.watch import Planned
from expertmesh.v1 import directory_pb2

BATCH_ROWS = 256
"""Of an emulated device, by which its capacity is modelled."""


def plan_for(reply: directory_pb2.ExpertLoadReply, config: ClusterConfig, manifest: Manifest) -> Planned:
    """Raises ClusterError without loads yet, ConfigError where they are of another model or there is no plan."""
    loads = observed_loads(reply, manifest)
    check_loads(loads, manifest, "directory")
    target = config.scaling.target_busy
    device = next((group.emulated for group in config.groups if group.emulated), None)
    capacity = observed_capacity(reply)
    if capacity is None and device is not None:
        capacity = modelled_capacity(device, manifest, BATCH_ROWS)
    capacity = capacity or assumed_capacity(loads, target, config.groups)
    memory_gib = max((group.memory_gib for group in config.groups if group.memory_gib), default=None)
    aims = Aims(capacity.rows_per_s, target, memory_gib=memory_gib)
    plan = _bounded(propose(manifest, loads, aims, Bounds(), config.groups).plan, config.groups)
    rates = numpy.nan_to_num(loads.array(manifest))
    now, planned = (
        evaluate(held_by(groups, manifest), rates, aims.capacity) for groups in (config.groups, plan.groups)
    )
    return Planned(
        plan,
        cost_now=cost(now, aims.capacity),
        cost_planned=cost(planned, aims.capacity),
        balancedness_now=float(now.balancedness.mean()),
        balancedness_planned=float(planned.balancedness.mean()),
    )


def _bounded(plan: Plan, today: Sequence[GroupSection]) -> Plan:
    """No group may grow beyond the most that one of today's may, unless these loads need it already."""
    most = max(group.max_replicas for group in today)
    needed = plan.predicted.group_replicas if plan.predicted else {}
    groups = [
        one.model_copy(update={"max_replicas": max(needed.get(one.name, 1), min(one.max_replicas, most))})
        for one in plan.groups
    ]
    return plan.model_copy(update={"groups": tuple(groups)})
