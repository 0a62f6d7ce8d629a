"""The policy against replicas whose load follows from how many there are: no hunting, no overshoot."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from expertmesh.config import ScalingSection
from expertmesh.scaling.policy import BAND, Bounds, GroupLoad, Memory, ReplicaLoad, decide

TICK_S = 0.25
START_S = 5.0
Demand = Callable[[float], float]
"""Seconds of computing that come in per second, at a time."""


@dataclass
class Group:
    """Replicas in a fluid model: they share all demand, what they cannot do waits, they report each second."""

    wanted: ScalingSection
    bounds: Bounds
    noise: float = 0.0
    target: int = 1
    running: int = 1
    backlog_s: float = 0.0
    busy: float = 0.0
    memory: Memory = field(default_factory=Memory)
    starting: list[float] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)
    reports: tuple[ReplicaLoad, ...] = ()
    reported_at: float = -10.0

    def run(self, demand: Demand, duration_s: float) -> list[tuple[float, int]]:
        """(when, target) of each tick."""
        chance = random.Random(1)
        history = []
        for tick in range(round(duration_s / TICK_S)):
            now = tick * TICK_S
            self._pass(now, demand(now) * (1 + self.noise * chance.uniform(-1, 1)))
            load = GroupLoad(now, self.running, self.target, self._reported(now))
            decision, self.memory = decide(load, self.wanted, self.bounds, self.memory)
            self.starting += [now + START_S] * max(0, decision.replicas - self.target)
            if decision.replicas < self.target:
                del self.starting[decision.replicas - self.running :]
                self.running = min(self.running, decision.replicas)
            self.target = decision.replicas
            history.append((now, self.target))
        return history

    def _pass(self, now: float, demand: float) -> None:
        self.running += sum(ready <= now for ready in self.starting)
        self.starting = [ready for ready in self.starting if ready > now]
        work = self.backlog_s + demand * TICK_S
        done = min(work, self.running * TICK_S)
        self.backlog_s = work - done
        self.busy += (done / (self.running * TICK_S) - self.busy) * TICK_S
        self.waits.append((now, 1000 * self.backlog_s / self.running))
        self.waits = [one for one in self.waits if now - one[0] <= 6]

    def _reported(self, now: float) -> tuple[ReplicaLoad, ...]:
        if now - self.reported_at >= 1 or len(self.reports) > self.running:
            self.reported_at = now
            longest = max(wait for _, wait in self.waits)
            one = ReplicaLoad("r", 0.0, self.busy, longest, 100 * self.busy, self.backlog_s)
            self.reports = (one,) * self.running
        return self.reports


@pytest.mark.parametrize("demand", [1.0, 2.5, 4.0])
def test_a_step_is_followed_in_time_and_overshot_by_no_more_than_a_step(demand: float) -> None:
    """More than in the end are needed while what has piled up is worked off."""
    group = Group(ScalingSection(down_after_s=30), Bounds(1, 20))
    history = group.run(lambda now: 0.3 if now < 20 or now >= 240 else demand, 400)
    first_step = next(now for now, target in history if target > 1)
    assert first_step <= 20 + 5
    needed = demand / 0.6
    (there,) = {target for now, target in history if 200 <= now < 240}
    assert needed / (1 + BAND) <= there < needed / (1 - BAND) + 1
    assert max(target for _, target in history) <= 2 * math.ceil(needed)
    assert history[-1][1] == 1


@pytest.mark.parametrize("demand", [0.5, 1.3, 2.9, 6.0])
def test_noise_moves_nothing(demand: float) -> None:
    group = Group(ScalingSection(down_after_s=15), Bounds(1, 20), noise=0.5)
    targets = [target for now, target in group.run(lambda _: demand, 600) if now >= 100]
    changes = sum(one != other for one, other in itertools.pairwise(targets))
    assert changes <= 1


def test_a_wave_is_followed_without_hunting() -> None:
    """A minute up, a minute down: each turn changes the direction once."""
    group = Group(ScalingSection(down_after_s=10), Bounds(1, 20))
    history = [target for _, target in group.run(lambda now: 0.4 + 3 * (now % 120 > 60), 480)]
    steps = [after - before for before, after in itertools.pairwise(history) if after != before]
    turns = sum(one * other < 0 for one, other in itertools.pairwise(steps))
    assert turns <= 8
