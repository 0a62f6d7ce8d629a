"""A scenario from its first tick to its last: all strategies side by side, on the same traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from expertmesh.simulation.fleet import Fleet
from expertmesh.simulation.lane import Lane, Sample
from expertmesh.simulation.layout import Layout, make_layout
from expertmesh.simulation.replanning import planned_lane
from expertmesh.simulation.scenario import Scenario, StrategyName
from expertmesh.simulation.service import ServiceModel
from expertmesh.simulation.sizing import Steady, peak_and_mean, replicas_for
from expertmesh.simulation.strategies import Alone, Fixed, Strategy, Uniform
from expertmesh.simulation.traffic import Traffic

SAMPLES = 480
"""Points of a series, at most."""


@dataclass(frozen=True)
class Simulated:
    scenario: Scenario
    layout: Layout
    lanes: tuple[Lane, ...]
    samples: tuple[Sample, ...]
    peak_tokens_per_s: float
    tokens: float


def simulate(scenario: Scenario, progress: Callable[[int], None] = lambda _: None) -> Simulated:
    """`progress` is told the ticks done. Raises ConfigError where groups do not cover the model."""
    layout = make_layout(scenario)
    model = ServiceModel(layout, scenario.model.cost)
    traffic = Traffic(scenario)
    lanes = _lanes(scenario, layout, model, traffic)
    every = -(-scenario.ticks // SAMPLES)
    samples: list[Sample] = []
    for tick in range(scenario.ticks):
        tokens, chances = float(traffic.tokens_per_s[tick]), traffic.chances(tick)
        for lane in lanes:
            loads = lane.tick(tick, tokens, chances)
            if tick % every == 0:
                samples.append(lane.sample(tick * scenario.policy.tick_s, tokens, loads))
        progress(tick + 1)
    peak, total = float(traffic.tokens_per_s.max()), float(traffic.tokens_per_s.sum() * scenario.policy.tick_s)
    return Simulated(scenario, layout, lanes, tuple(samples), peak, total)


def _lanes(scenario: Scenario, layout: Layout, model: ServiceModel, traffic: Traffic) -> tuple[Lane, ...]:
    """Every strategy begins with what it would have settled on under the first tick's load."""
    at_first = Steady(numpy.full(len(layout.groups), traffic.tokens_per_s[0]), traffic.chances(0)[layout.pairs])
    first = replicas_for(at_first, layout, model, scenario)
    begin: dict[StrategyName, NDArray[numpy.int64]] = {"groups": first, "uniform": numpy.full_like(first, first.max())}
    if {"static_peak", "static_mean"} & set(scenario.strategies):
        peak, mean = peak_and_mean(traffic, layout, scenario.ticks)
        begin["static_peak"] = replicas_for(peak, layout, model, scenario)
        begin["static_mean"] = replicas_for(mean, layout, model, scenario)
    return tuple(
        planned_lane(scenario, traffic)
        if name == "planned"
        else Lane(
            name, scenario, layout, model, Fleet(scenario, layout, begin[name]), _strategy(name, scenario, layout)
        )
        for name in scenario.strategies
    )


def _strategy(name: StrategyName, scenario: Scenario, layout: Layout) -> Strategy:
    if name == "groups":
        return Alone(scenario, layout)
    return Uniform(scenario, layout) if name == "uniform" else Fixed()
