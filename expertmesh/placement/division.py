"""A division of experts into groups as arrays, and what it costs under given loads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from expertmesh.placement.arrays import Floats
from expertmesh.placement.ranks import replicas_for

SWEEPS = 8
Held = NDArray[numpy.bool_]
"""[L, G, E]: which group holds which experts."""


@dataclass(frozen=True)
class Division:
    held: Held
    served: Floats
    """[L, G, E], rows/s: an expert's load, split between the groups that hold it."""
    replicas: Floats
    """[G], which bring every group to its target or below."""

    @property
    def layer_loads(self) -> Floats:
        """[L, G], rows/s."""
        loads: Floats = self.served.sum(axis=2)
        return loads

    @property
    def group_loads(self) -> Floats:
        """[G], rows/s over all layers."""
        loads: Floats = self.served.sum(axis=(0, 2))
        return loads

    @property
    def sizes(self) -> Floats:
        """[G], experts of one replica over all layers."""
        counts: Floats = self.held.sum(axis=(0, 2)).astype(numpy.float64)
        return counts

    @property
    def copies(self) -> float:
        """Experts that all replicas hold together."""
        return float(self.sizes @ self.replicas)

    @property
    def balancedness(self) -> Floats:
        """[L]: mean over maximum of the loads of all replicas, 0 to 1; 1 where there is no load."""
        loads = self.layer_loads
        awake = self.replicas > 0
        if not awake.any():
            return numpy.ones(len(loads))
        largest = (loads[:, awake] / self.replicas[awake]).max(axis=1)
        mean = loads.sum(axis=1) / self.replicas.sum()
        ratio: Floats = numpy.divide(mean, largest, out=numpy.ones_like(mean), where=largest > 0)
        return ratio


def evaluate(held: Held, loads: Floats, capacity: float, least: Floats | None = None) -> Division:
    """held [L, G, E] under loads [L, E]: replicas as the loads need them, and `least` [G] at least (default 1 each)."""
    floor = numpy.ones(held.shape[1]) if least is None else least
    replicas = numpy.maximum(1.0, floor)
    once = not (held.sum(axis=1) > 1).any()
    for _ in range(1 if once else 3):
        served = split(held, loads, replicas)
        needed = replicas_for(served.sum(axis=(0, 2)), capacity)
        replicas = numpy.maximum(needed, numpy.maximum(1.0, floor))
    asleep = (floor == 0) & (served.sum(axis=(0, 2)) == 0)
    return Division(held, served, numpy.where(asleep, 0.0, replicas))


def split(held: Held, loads: Floats, replicas: Floats) -> Floats:
    """[L, G, E]: how routers that take the least loaded replica split each expert's load between its groups.

    Block coordinate descent on the sum of squared loads per replica: one expert after the other fills the least loaded
    of its groups; each pass over them brings the loads nearer to the evenest there are.
    """
    served = held * loads[:, None, :]
    homes = held.sum(axis=1)
    for layer in numpy.flatnonzero((homes > 1).any(axis=1)):
        shared = numpy.flatnonzero(homes[layer] > 1)
        shared = shared[numpy.argsort(-loads[layer, shared], kind="stable")]
        served[layer][:, shared] /= homes[layer, shared]
        sums = served[layer].sum(axis=1)
        for _ in range(SWEEPS):
            for expert in shared:
                groups = numpy.flatnonzero(held[layer, :, expert])
                others = sums[groups] - served[layer, groups, expert]
                filled = fill(others, replicas[groups], loads[layer, expert])
                sums[groups], served[layer, groups, expert] = others + filled, filled
    return served


def fill(loads: Floats, replicas: Floats, more: float) -> Floats:
    """How `more` load goes to groups [N] that carry `loads`, so that the largest load per replica stays least."""
    order = numpy.argsort(loads / replicas, kind="stable")
    sums, counts = loads[order].cumsum(), replicas[order].cumsum()
    levels = (more + sums) / counts
    # the level up to which the first n groups are filled holds where the next one lies above it
    following = numpy.append((loads / replicas)[order][1:], numpy.inf)
    level = levels[int((levels <= following).argmax())]
    added: Floats = numpy.maximum(level * replicas - loads, 0.0)
    total = added.sum()
    return added * (more / total) if total > 0 else added
