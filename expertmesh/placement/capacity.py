"""Rows/s that one replica sustains: given, from a modelled device, observed, or assumed; with where it comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import EmulatedDevice, GroupSection
from expertmesh.placement.loads import Loads
from expertmesh.placement.sizing import roofline_rows_per_s
from expertmesh.v1 import directory_pb2

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


def observed_capacity(reply: directory_pb2.ExpertLoadReply) -> Capacity | None:
    """From the rows of a window and how long the replicas were busy with them; None where they had too little to do, or
    the directory does not tell."""
    rows = sum(sum(layer.rows) for layer in reply.layers)
    if not rows > 0 or not reply.window_s > 0 or not reply.busy_s > LEAST_BUSY * reply.window_s:
        return None
    busy = reply.busy_s / reply.window_s
    return Capacity(rows / reply.busy_s, f"observed: {rows / reply.window_s:,.0f} rows/s keep {busy:.2f} replicas busy")


def assumed_capacity(loads: Loads, target_busy: float, today: Iterable[GroupSection]) -> Capacity:
    """As if today's fewest replicas, or without any one replica, carried these loads at their target."""
    total = sum(map(sum, loads.rows_per_s.values()))
    replicas = sum(max(1, group.min_replicas) for group in today)
    who = f"today's {replicas} replicas carry" if replicas else "one replica carries"
    return Capacity(
        total / (max(1, replicas) * target_busy), f"assumed: {who} these loads at the target; give --rows-per-replica"
    )
