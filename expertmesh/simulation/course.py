"""One strategy from a scenario's first tick to its last, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy

from expertmesh.simulation.fleet import Fleet, Used
from expertmesh.simulation.lane import Lane, Sample, Totals
from expertmesh.simulation.layout import make_layout
from expertmesh.simulation.replanning import planned_lane
from expertmesh.simulation.scenario import Scenario, StrategyName
from expertmesh.simulation.service import ServiceModel
from expertmesh.simulation.sizing import Steady, peak_and_mean, replicas_for
from expertmesh.simulation.strategies import Alone, Fixed, Strategy, Uniform
from expertmesh.simulation.traffic import Traffic

SAMPLES = 480
"""Points of a series, at most."""
Told = Callable[[int], None]
"""Hears how many ticks are done."""


@dataclass(frozen=True)
class Course:
    name: StrategyName
    totals: Totals
    used: Used
    running: tuple[int, ...]
    """Replicas of each group at the end."""
    plans: int
    samples: tuple[Sample, ...]


def course(scenario: Scenario, name: StrategyName, progress: Told) -> Course:
    """On the scenario's traffic, which is the same for every strategy. Raises ConfigError where groups do not cover the
    model or there is no plan."""
    traffic = Traffic(scenario)
    lane = planned_lane(scenario, traffic) if name == "planned" else _lane(scenario, name, traffic)
    every = -(-scenario.ticks // SAMPLES)
    samples: list[Sample] = []
    for tick in range(scenario.ticks):
        tokens = float(traffic.tokens_per_s[tick])
        loads = lane.tick(tick, tokens, traffic.chances(tick))
        if tick % every == 0:
            samples.append(lane.sample(tick * scenario.policy.tick_s, tokens, loads))
        progress(tick + 1)
    return Course(name, lane.totals, lane.fleet.used, tuple(lane.fleet.running), lane.plans, tuple(samples))


def _lane(scenario: Scenario, name: StrategyName, traffic: Traffic) -> Lane:
    """A fixed fleet is made for the whole run; others begin with what they would have settled on under the first tick's
    load."""
    layout = make_layout(scenario)
    model = ServiceModel(layout, scenario.model.cost)
    if name in ("static_peak", "static_mean"):
        peak, mean = peak_and_mean(traffic, layout, scenario.ticks)
        load = peak if name == "static_peak" else mean
    else:
        load = Steady(numpy.full(len(layout.groups), traffic.tokens_per_s[0]), traffic.chances(0)[layout.pairs])
    replicas = replicas_for(load, layout, model, scenario)
    strategy: Strategy = Fixed()
    if name == "groups":
        strategy = Alone(scenario, layout)
    elif name == "uniform":
        strategy, replicas = Uniform(scenario, layout), numpy.full_like(replicas, replicas.max())
    return Lane(name, scenario, layout, model, Fleet(scenario, layout, replicas), strategy)
