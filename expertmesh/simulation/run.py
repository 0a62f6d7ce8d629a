"""A scenario from its first tick to its last: all strategies side by side, on the same traffic."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.simulation.apart import courses_apart
from expertmesh.simulation.course import Course, Told, course
from expertmesh.simulation.lane import Sample
from expertmesh.simulation.layout import Layout, make_layout
from expertmesh.simulation.scenario import Scenario
from expertmesh.simulation.traffic import Traffic


@dataclass(frozen=True)
class Simulated:
    scenario: Scenario
    layout: Layout
    courses: tuple[Course, ...]
    samples: tuple[Sample, ...]
    """In the order of their times."""
    peak_tokens_per_s: float
    tokens: float


def simulate(scenario: Scenario, progress: Told = lambda _: None, apart: bool = False) -> Simulated:
    """`progress` is told the ticks done, as a mean over strategies; `apart` gives each strategy a process of its own,
    with the same results. Raises ConfigError where groups do not cover the model, ProcessEnded where a process does not
    come to its end."""
    layout = make_layout(scenario)
    traffic = Traffic(scenario)
    if apart and len(scenario.strategies) > 1:
        courses = courses_apart(scenario, progress)
    else:
        courses = _one_by_one(scenario, progress)
    samples = sorted((sample for one in courses for sample in one.samples), key=lambda sample: sample.at_s)
    peak, total = float(traffic.tokens_per_s.max()), float(traffic.tokens_per_s.sum() * scenario.policy.tick_s)
    return Simulated(scenario, layout, courses, tuple(samples), peak, total)


def _one_by_one(scenario: Scenario, progress: Told) -> tuple[Course, ...]:
    courses: list[Course] = []
    for name in scenario.strategies:
        before = len(courses) * scenario.ticks

        def tell(ticks: int, before: int = before) -> None:
            progress((before + ticks) // len(scenario.strategies))

        courses.append(course(scenario, name, tell))
    return tuple(courses)
