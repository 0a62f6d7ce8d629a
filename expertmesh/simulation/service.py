"""Groups under load: service times by the emulated device's roofline, busy shares and waits by `queueing`; pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from expertmesh.config import EmulatedDevice
from expertmesh.scaling.emulation import ExpertCost
from expertmesh.simulation.demand import Messages
from expertmesh.simulation.layout import Layout
from expertmesh.simulation.queueing import PER_SERVICE
from expertmesh.simulation.tables import Located, Tables

Floats = NDArray[numpy.float64]
MAX_BATCH_ROWS = 8192
"""As replicas limit it."""
LEAST_ROWS = 1e-6
"""Of a message to a group that nobody asks: what waits there has to go in messages of some size."""
FULL = 0.995
"""Share of a group's greatest throughput from which on rows pile up."""


@dataclass(frozen=True)
class Loads:
    """Of each group [G] during one tick."""

    rows_per_s: Floats
    """That came."""
    served: Floats
    """Rows computed in the tick."""
    waiting: Floats
    """Rows left over at its end."""
    busy: Floats
    service_s: Floats
    mean_wait_s: Floats
    p95_wait_s: Floats
    behind_s: Floats
    """Of the waits, the part that comes from rows left over."""
    batch: Floats
    """Messages computed together; where the next tick's search begins."""
    _at: Located
    _beyond: Floats

    def later_than(self, wait_s: Floats) -> Floats:
        """wait_s [G, W] -> shares of the rows that wait longer [G, W]."""
        group, low, weight = self._at
        below = self._beyond[group, low]
        beyond = below + (self._beyond[group, low + 1] - below) * weight[:, None]
        last = beyond.shape[1] - 1
        place = (wait_s - self.behind_s[:, None]) * (PER_SERVICE / numpy.maximum(self.service_s, 1e-9))[:, None]
        inside = numpy.clip(place, 0, last - 1e-9)
        knot = inside.astype(numpy.int64)
        here = numpy.take_along_axis(beyond, knot, axis=1)
        found = here + (numpy.take_along_axis(beyond, knot + 1, axis=1) - here) * (inside - knot)
        return numpy.where(place < 0, 1.0, numpy.where(place >= last, 0.0, found))


class ServiceModel:
    """Of the groups of one layout."""

    def __init__(self, layout: Layout, cost: ExpertCost) -> None:
        self._layout = layout
        self._cost = cost
        devices = [group.device for group in layout.groups]
        self._device = DeviceArrays.of(devices)
        self._tables = Tables()

    def loads(self, sent: Messages, running: Floats, waiting: Floats, tick_s: float, batch: Floats | None) -> Loads:
        """`running` replicas of each group [G] get messages for `tick_s` seconds while `waiting` rows wait already.

        Within a tick the queues are in equilibrium (pointwise stationary; Green and Kolesar 1991), but for rows beyond
        what the replicas can compute at all, which flow over into the next tick as a fluid.
        """
        replicas = numpy.maximum(running, 1.0)
        most, capacity = self._capacity(sent)
        capacity = numpy.where(running > 0, capacity * replicas, 0.0)
        came = sent.per_s * tick_s
        rows = numpy.maximum(sent.rows, LEAST_ROWS)
        left = waiting / rows
        done = numpy.minimum(left + came, FULL * capacity * tick_s)
        batch, service_s, x = self._batches(sent, done / tick_s / replicas, most, batch, replicas)
        group, low, weight = at = self._tables.locate(self._layout.layers, replicas, x)
        busy = numpy.where(running > 0, self._tables.mix("busy", at), 0.0)
        mean, p95 = self._tables.mix("mean_wait", at), self._tables.mix("p95_wait", at)
        still = numpy.maximum(left + came - done, 0.0)
        idle = running <= 0
        behind = numpy.where(
            idle, numpy.where(still > 0, tick_s, 0.0), (left + still) / 2 / numpy.maximum(capacity, 1e-12)
        )
        return Loads(
            rows_per_s=sent.per_s * rows,
            served=done * rows,
            waiting=still * rows,
            busy=busy,
            service_s=service_s,
            mean_wait_s=mean * service_s + behind,
            p95_wait_s=p95 * service_s + behind,
            behind_s=behind,
            batch=batch,
            _at=(group, low, weight),
            _beyond=self._tables.beyond,
        )

    def _batches(
        self, sent: Messages, per_s: Floats, most: Floats, batch: Floats | None, replicas: Floats
    ) -> tuple[Floats, Floats, Floats]:
        """Messages computed together, the time that takes, and messages per replica and service time: larger batches
        take longer, longer ones grow larger, up to a fixed point."""
        rounds = 3 if batch is not None else 40
        batch = numpy.ones_like(per_s) if batch is None else numpy.minimum(batch, most)
        for _ in range(rounds):
            service_s = self._service_s(sent, batch)
            x = per_s * service_s
            busy = self._tables.mix("busy", self._tables.locate(self._layout.layers, replicas, x))
            batch = (batch + numpy.clip(x / numpy.maximum(busy, 1e-12), 1.0, most)) / 2
        service_s = self._service_s(sent, batch)
        return batch, service_s, per_s * service_s

    def _service_s(self, sent: Messages, batch: Floats) -> Floats:
        layout = self._layout
        touched = -numpy.expm1(sent.untouched * batch[layout.group_of])
        return self._device.batch_s(self._cost, batch * sent.pairs, layout.per_group(touched) / layout.layers)

    def _capacity(self, sent: Messages) -> tuple[Floats, Floats]:
        """Messages in the largest batch, and messages/s of a replica that computes only such."""
        most = numpy.maximum(1.0, MAX_BATCH_ROWS / numpy.maximum(sent.rows, LEAST_ROWS))
        experts = self._layout.sizes / self._layout.layers
        return most, most / self._device.batch_s(self._cost, most * sent.pairs, experts)


@dataclass(frozen=True)
class DeviceArrays:
    """Each group's device [G]."""

    flops_per_s: Floats
    bytes_per_s: Floats
    overhead_s: Floats

    @classmethod
    def of(cls, devices: list[EmulatedDevice]) -> DeviceArrays:
        return cls(
            numpy.array([one.teraflops * 1e12 for one in devices]),
            numpy.array([one.memory_gb_per_s * 1e9 for one in devices]),
            numpy.array([one.overhead_us * 1e-6 for one in devices]),
        )

    def batch_s(self, cost: ExpertCost, pairs: Floats, experts: Floats) -> Floats:
        """`emulation.batch_s` of all groups at once."""
        compute_s = pairs * cost.flops_per_pair / self.flops_per_s
        memory_s = (experts * cost.weight_bytes + pairs * cost.row_bytes) / self.bytes_per_s
        return numpy.maximum(compute_s, memory_s) + self.overhead_s
