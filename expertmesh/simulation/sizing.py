"""The fewest replicas that carry a steady load within the policy's targets: static fleets, and how every one begins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from expertmesh.simulation.demand import demand, messages
from expertmesh.simulation.layout import Layout
from expertmesh.simulation.scenario import Scenario
from expertmesh.simulation.service import ServiceModel
from expertmesh.simulation.traffic import Traffic

Floats = NDArray[numpy.float64]


@dataclass(frozen=True)
class Steady:
    """A load for each group: tokens/s [G] and the chances [P] of its experts."""

    tokens_per_s: Floats
    chances: Floats


def peak_and_mean(traffic: Traffic, layout: Layout, ticks: int) -> tuple[Steady, Steady]:
    """Each group's own busiest tick, and its mean over all."""
    groups = len(layout.groups)
    most, peak_tokens, peak_chances = numpy.zeros(groups), numpy.zeros(groups), numpy.zeros(len(layout.pairs))
    weighted = numpy.zeros(len(layout.pairs))
    for tick in range(ticks):
        chances = traffic.chances(tick)[layout.pairs]
        tokens = float(traffic.tokens_per_s[tick])
        load = tokens * layout.per_group(chances)
        more = load > most
        if more.any():
            most[more], peak_tokens[more] = load[more], tokens
            where = more[layout.group_of]
            peak_chances[where] = chances[where]
        weighted += tokens * chances
    total = float(traffic.tokens_per_s.sum())
    mean = Steady(numpy.full(groups, total / ticks), weighted / total)
    return Steady(peak_tokens, peak_chances), mean


def replicas_for(steady: Steady, layout: Layout, model: ServiceModel, scenario: Scenario) -> NDArray[numpy.int64]:
    """[G], within the groups' bounds; by bisection."""
    shares = 1 / layout.homes
    asked = demand(layout, steady.tokens_per_s, steady.chances * shares, scenario.traffic.tokens_per_step)
    busy = numpy.array([group.scaling.target_busy for group in layout.groups])
    wait_s = numpy.array([group.scaling.queue_wait_ms / 1e3 for group in layout.groups])
    low = numpy.array([max(1, group.bounds.min_replicas) for group in layout.groups])
    high = numpy.maximum(low, [group.bounds.max_replicas for group in layout.groups])
    none = numpy.zeros(len(low))
    while (low < high).any():
        middle = (low + high) // 2
        running = middle.astype(numpy.float64)
        found = model.loads(messages(layout, asked, running), running, none, 1.0, None)
        enough = (found.busy <= busy) & (found.p95_wait_s <= wait_s) & (found.waiting <= 0)
        high, low = numpy.where(enough, middle, high), numpy.where(enough, low, middle + 1)
        low = numpy.minimum(low, high)
    return numpy.asarray(high)
