"""Rows/s that one replica sustains: given, from a modelled device, observed, or assumed; with where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import EmulatedDevice, GroupSection
from expertmesh.placement.loads import Loads
from expertmesh.placement.sizing import roofline_rows_per_s
from expertmesh.v1 import directory_pb2, expert_pb2

LEAST_BUSY = 0.02
"""Replicas together must be busier than this for their busy share to say anything."""


@dataclass(frozen=True)
class Capacity:
    rows_per_s: float
    """Of one replica that computes all the time, over all layers."""
    source: str
    """For people: one clause."""


def given_capacity(rows_per_s: float) -> Capacity:
    return Capacity(rows_per_s, "given")


def modelled_capacity(device: EmulatedDevice, manifest: Manifest, batch_rows: int) -> Capacity:
    """By the roofline model, in batches of `batch_rows` rows."""
    what = f"{device.teraflops:g} TFLOP/s and {device.memory_gb_per_s:g} GB/s"
    return Capacity(
        roofline_rows_per_s(device, manifest, batch_rows), f"modelled: {what}, batches of {batch_rows} rows"
    )


def observed_capacity(rows: float, window_s: float, tables: Sequence[directory_pb2.Table]) -> Capacity | None:
    """From rows counted in a window and the busy shares that replicas reported in it; None where they had too little to
    do, or report what is no share."""
    busy = [sum(_busy_shares(table)) for table in tables]
    mean = sum(busy) / len(busy) if busy else 0.0
    if not mean > LEAST_BUSY or not rows > 0 or not window_s > 0:
        return None
    return Capacity(rows / window_s / mean, f"observed: {rows / window_s:,.0f} rows/s keep {mean:.2f} replicas busy")


def assumed_capacity(loads: Loads, target_busy: float, today: Iterable[GroupSection]) -> Capacity:
    """As if today's fewest replicas, or without any one replica, carried these loads at their target."""
    total = sum(map(sum, loads.rows_per_s.values()))
    replicas = sum(max(1, group.min_replicas) for group in today)
    who = f"today's {replicas} replicas carry" if replicas else "one replica carries"
    return Capacity(
        total / (max(1, replicas) * target_busy), f"assumed: {who} these loads at the target; give --rows-per-replica"
    )


def _busy_shares(table: directory_pb2.Table) -> list[float]:
    ready = (one.load.busy for one in table.replicas if one.state == expert_pb2.REPLICA_STATE_READY)
    return [min(1.0, busy) for busy in ready if 0 <= busy <= 1.05]
