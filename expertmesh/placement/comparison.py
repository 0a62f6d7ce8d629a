"""Divisions side by side: what each costs and how even it is, under the same loads."""

from __future__ import annotations

import math

import numpy
import pydantic

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import Section
from expertmesh.coverage import GIB
from expertmesh.placement.arrays import Floats, balancedness, device_loads
from expertmesh.placement.division import Division
from expertmesh.placement.eplb import eplb
from expertmesh.placement.plan import Prediction
from expertmesh.placement.planner import Aims

HOUR_S = 3600.0


class Figures(Prediction):
    """Of one division, at the given loads."""

    busiest: float = pydantic.Field(description="Load of the busiest replica as a share of what one sustains.")
    memory_gib_hours_per_day: float = pydantic.Field(description="Memory of all replicas x time, at these loads held.")


class PlannedGroup(Section):
    name: str
    experts_per_layer: float = pydantic.Field(description="Mean over layers.")
    load_share: float = pydantic.Field(description="Of all rows, 0 to 1.")
    replicas: int = pydantic.Field(description="Which these loads need.")
    busy: float = pydantic.Field(description="Of each of them, 0 to 1.")
    memory_gib: float = pydantic.Field(description="Of experts in one replica.")
    min_replicas: int
    max_replicas: int


def figures(division: Division, manifest: Manifest, aims: Aims) -> Figures:
    even = division.balancedness
    awake = division.replicas > 0
    busiest = (division.group_loads[awake] / division.replicas[awake]).max(initial=0.0) / aims.rows_per_replica
    return _figures(even, busiest, int(division.replicas.sum()), division.copies, manifest)


def eplb_figures(loads: Floats, division: Division, manifest: Manifest, aims: Aims) -> Figures:
    """Of EPLB's placement (the baseline) on as many replicas as `division` has, with as many slots per layer as it
    holds experts, rounded up so that all have equally many. An expert's load is split equally between its copies."""
    replicas = int(division.replicas.sum())
    even = numpy.ones(len(loads))
    busy, copies = numpy.zeros(replicas), 0.0
    counts = (~numpy.isnan(loads)).sum(axis=1)
    per_expert = division.copies / counts.sum()
    for count in numpy.unique(counts):
        rows = numpy.flatnonzero(counts == count)
        room = math.ceil(max(count, per_expert * count - 1e-9) / replicas)
        part = loads[rows, :count]
        per_device = device_loads(part, eplb(part, room * replicas, replicas), replicas)
        even[rows] = balancedness(per_device)
        busy += per_device.sum(axis=0)
        copies += room * replicas * len(rows)
    return _figures(even, busy.max() / aims.rows_per_replica, replicas, copies, manifest)


def _figures(even: Floats, busiest: float, replicas: int, copies: float, manifest: Manifest) -> Figures:
    memory_gib = copies * manifest.expert_bytes / GIB
    return Figures(
        balancedness=float(even.mean()),
        worst_layer_balancedness=float(even.min()),
        replicas=replicas,
        memory_gib=memory_gib,
        replica_seconds_per_hour=replicas * HOUR_S,
        busiest=float(busiest),
        memory_gib_hours_per_day=memory_gib * 24,
    )
