"""The strategy `planned`: groups by the planner, and from one plan to the next as `expertmesh rebalance` does it.

New groups come up beside the old ones and share their experts' rows by running replicas; once all of them run, the old
ones drain. Both hold GPUs for so long.
"""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

from expertmesh.simulation.fleet import Fleet
from expertmesh.simulation.lane import Lane
from expertmesh.simulation.layout import Layout, layout_of
from expertmesh.simulation.planning import planned_groups
from expertmesh.simulation.scenario import PlannerSection, Scenario
from expertmesh.simulation.service import Loads, ServiceModel
from expertmesh.simulation.sizing import Steady, replicas_for
from expertmesh.simulation.strategies import Alone
from expertmesh.simulation.traffic import Traffic

Floats = NDArray[numpy.float64]


def planned_lane(scenario: Scenario, traffic: Traffic) -> PlannedLane:
    """Begins with the plan for the first tick's load, sized for it. Raises ConfigError where there is none."""
    assert scenario.planner is not None
    tokens, chances = float(traffic.tokens_per_s[0]), traffic.chances(0)
    layout = layout_of(planned_groups(scenario, scenario.planner, tokens * chances, 0), scenario)
    model = ServiceModel(layout, scenario.model.cost)
    steady = Steady(numpy.full(len(layout.groups), tokens), chances[layout.pairs])
    fleet = Fleet(scenario, layout, replicas_for(steady, layout, model, scenario))
    return PlannedLane(scenario, scenario.planner, layout, model, fleet)


class PlannedLane(Lane):
    strategy: Alone

    def __init__(
        self, scenario: Scenario, section: PlannerSection, layout: Layout, model: ServiceModel, fleet: Fleet
    ) -> None:
        super().__init__("planned", scenario, layout, model, fleet, Alone(scenario, layout))
        self._section = section
        self._rows = numpy.zeros(scenario.model.layers * scenario.model.experts)
        self._ticks, self._planned_at = 0, 0.0
        self._leaving = 0
        """Groups of the last plan that are still there."""

    def tick(self, tick: int, tokens_per_s: float, chances: Floats) -> Loads:
        self._rows += tokens_per_s * chances
        self._ticks += 1
        if self._leaving:
            self._try_to_finish()
        elif self._section.every_s is not None and self.fleet.now - self._planned_at >= self._section.every_s:
            self._begin(tokens_per_s, chances)
        return super().tick(tick, tokens_per_s, chances)

    def _begin(self, tokens_per_s: float, chances: Floats) -> None:
        """A new plan for the loads since the last, sized for those of now."""
        groups = planned_groups(self._scenario, self._section, self._rows / self._ticks, self.plans)
        alone = layout_of(groups, self._scenario)
        steady = Steady(numpy.full(len(groups), tokens_per_s), chances[alone.pairs])
        sizes = replicas_for(steady, alone, ServiceModel(alone, self._scenario.model.cost), self._scenario).tolist()
        self._leaving, first = len(self._layout.groups), len(self.fleet.running)
        self.fleet.add(alone)
        for place, replicas in enumerate(sizes):
            self.fleet.ask(first + place, replicas, self._scenario.policy.delay_s)
        self.strategy.join(groups)
        waiting = numpy.concatenate([self._waiting, numpy.zeros(len(groups))])
        self._change(layout_of((*self._layout.groups, *groups), self._scenario), waiting)
        self.plans += 1
        self._planned_at, self._ticks = self.fleet.now, 0
        self._rows[:] = 0.0

    def _try_to_finish(self) -> None:
        """Once every new group runs as it was asked to, the old ones go; what waits for them waits for the new ones."""
        kept = self._first + self._leaving
        if not self.fleet.settled(kept):
            return
        for place in range(self._first, kept):
            self.fleet.ask(place, 0, self._scenario.policy.delay_s)
        self.strategy.leave(self._leaving)
        self._first = kept
        new = self._layout.groups[self._leaving :]
        running = numpy.array(self.fleet.running[kept:], dtype=numpy.float64)
        moved = self._waiting[: self._leaving].sum() * running / max(1.0, running.sum())
        self._change(layout_of(new, self._scenario), self._waiting[self._leaving :] + moved)
        self._leaving = 0

    def _change(self, layout: Layout, waiting: Floats) -> None:
        self._layout, self._waiting = layout, waiting
        self._model = ServiceModel(layout, self._scenario.model.cost)
        self._batch = None
        self._recent.clear()
