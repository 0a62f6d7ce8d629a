"""How many replicas each group gets: by the scaling policy alone, by the hottest group's load, or fixed.

`groups` and `uniform` call `expertmesh.scaling.policy.decide`, the function that Ray Serve's controller runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy
from numpy.typing import NDArray

from expertmesh.scaling.policy import Bounds, GroupLoad, Memory, ReplicaLoad, decide
from expertmesh.simulation.fleet import Fleet
from expertmesh.simulation.layout import Group, Layout
from expertmesh.simulation.scenario import Scenario
from expertmesh.simulation.service import Loads

Floats = NDArray[numpy.float64]


class Strategy(Protocol):
    def act(self, fleet: Fleet, loads: Loads, first: int) -> None:
        """Asks the fleet for what each group should have; `loads` are as old as the scenario's metrics, and of the
        fleet's groups from number `first` on."""
        ...


class Fixed:
    """Never changes anything."""

    def act(self, fleet: Fleet, loads: Loads, first: int) -> None:
        return


class Alone:
    """Each group by its own load: what expertmesh does."""

    def __init__(self, scenario: Scenario, layout: Layout) -> None:
        self._groups = layout.groups
        self._memories = [Memory() for _ in layout.groups]
        self._age_s, self._delay_s = scenario.policy.metrics_age_s, scenario.policy.delay_s

    def act(self, fleet: Fleet, loads: Loads, first: int) -> None:
        reported = _Reported.of(loads)
        for number, group in enumerate(self._groups):
            place = first + number
            load = reported.load(number, fleet.now, fleet.running[place], fleet.target[place], self._age_s)
            decision, self._memories[number] = decide(load, group.scaling, group.bounds, self._memories[number])
            fleet.ask(place, decision.replicas, self._delay_s)

    def join(self, groups: tuple[Group, ...]) -> None:
        """More groups, behind those that are there."""
        self._groups += groups
        self._memories += [Memory() for _ in groups]

    def leave(self, count: int) -> None:
        """The first groups are not scaled any more."""
        self._groups, self._memories = self._groups[count:], self._memories[count:]


class Uniform:
    """All groups the same number, as the hottest needs: scaling of whole expert-parallel instances. One decision for
    all, unlike `benchmarks/switched_policy.py`, which decides for each."""

    def __init__(self, scenario: Scenario, layout: Layout) -> None:
        self._bounds = widest(layout.groups)
        self._targets = scenario.scaling
        self._memory = Memory()
        self._age_s, self._delay_s = scenario.policy.metrics_age_s, scenario.policy.delay_s

    def act(self, fleet: Fleet, loads: Loads, first: int) -> None:
        hottest = int(numpy.argmax(loads.busy + loads.p95_wait_s * 1e-6))
        reported = _Reported.of(loads)
        place = first + hottest
        load = reported.load(hottest, fleet.now, fleet.running[place], fleet.target[place], self._age_s)
        decision, self._memory = decide(load, self._targets, self._bounds, self._memory)
        for number in range(first, len(fleet.target)):
            fleet.ask(number, decision.replicas, self._delay_s)


def widest(groups: tuple[Group, ...]) -> Bounds:
    """The bounds within which all groups' lie."""
    return Bounds(
        min(group.bounds.min_replicas for group in groups), max(group.bounds.max_replicas for group in groups)
    )


@dataclass(frozen=True)
class _Reported:
    """Plain values of all groups: one conversion per tick."""

    busy: list[float]
    wait_ms: list[float]
    rows_per_s: list[float]
    waiting: list[float]

    @classmethod
    def of(cls, loads: Loads) -> _Reported:
        return cls(
            loads.busy.tolist(),
            (loads.p95_wait_s * 1e3).clip(max=3.6e6).tolist(),
            loads.rows_per_s.tolist(),
            loads.waiting.tolist(),
        )

    def load(self, number: int, now: float, running: int, target: int, age_s: float) -> GroupLoad:
        """Every running replica reports the same, since they share a group's rows alike."""
        each = max(1, running)
        rows_per_s, waiting = self.rows_per_s[number] / each, self.waiting[number] / each
        one = ReplicaLoad("", age_s, self.busy[number], self.wait_ms[number], rows_per_s, waiting)
        wanted = not running and (rows_per_s > 0 or waiting > 0)
        return GroupLoad(now, running, target, (one,) * running, wanted)
