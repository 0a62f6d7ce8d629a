"""One strategy through a day: its groups, its fleet, its rows that wait, and what has been counted."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field

import numpy
from numpy.typing import NDArray

from expertmesh.simulation.demand import demand, messages, shares_of
from expertmesh.simulation.fleet import Fleet
from expertmesh.simulation.layout import Layout
from expertmesh.simulation.scenario import Scenario, StrategyName
from expertmesh.simulation.service import Loads, ServiceModel
from expertmesh.simulation.strategies import Strategy

Floats = NDArray[numpy.float64]
WAITS_S: Floats = numpy.geomspace(1e-5, 1e5, 81)
"""Waits that are told apart over the whole run."""
HISTOGRAM_S = 60.0
"""How often they are: it is the dearest figure."""
CLASSES = (("hottest tenth", 0.1), ("next four tenths", 0.5), ("cooler half", 1.0))
"""Groups by their load at the moment, and the share up to which each class reaches."""


IN_TIME_SHARE = 0.99
"""Of a tick's rows that must be in time for the tick to count as such."""


@dataclass
class Totals:
    """Of one strategy, over the run; rows are counted once per layer."""

    rows_in: float = 0.0
    rows_served: float = 0.0
    rows_waiting: float = 0.0
    """At the end."""
    rows_in_time: float = 0.0
    ticks_in_time: int = 0
    wait_row_s: float = 0.0
    later: Floats = field(default_factory=lambda: numpy.zeros(len(WAITS_S)))
    """Rows that waited longer than WAITS_S, of those that are counted for it."""
    rows_in_histogram: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One strategy at one moment."""

    strategy: StrategyName
    at_s: float
    tokens_per_s: float
    replicas: int
    running: int
    pending: int
    nodes: int
    busy: float
    p95_wait_ms: float
    """Mean over groups, by their rows."""
    classes: tuple[int, ...]
    """Running replicas of each of CLASSES."""


class Lane:
    """One strategy with its fleet."""

    def __init__(
        self,
        name: StrategyName,
        scenario: Scenario,
        layout: Layout,
        model: ServiceModel,
        fleet: Fleet,
        strategy: Strategy,
    ) -> None:
        self.name: StrategyName = name
        self.fleet = fleet
        self.strategy = strategy
        self.totals = Totals()
        self.plans = 1
        """That it has followed."""
        self._scenario, self._layout, self._model = scenario, layout, model
        self._first = 0
        """The fleet's number of the layout's first group."""
        self._waiting = numpy.zeros(len(layout.groups))
        self._batch: Floats | None = None
        self._recent: deque[Loads] = deque(maxlen=1 + round(scenario.policy.metrics_age_s / scenario.policy.tick_s))
        self._histogram_every = max(1, round(HISTOGRAM_S / scenario.policy.tick_s))
        self._objective_s = scenario.objective.layer_ms / 1e3

    def tick(self, tick: int, tokens_per_s: float, chances: Floats) -> Loads:
        """One tick of load on what runs now, then the strategy's decision at its end."""
        tick_s = self._scenario.policy.tick_s
        running = numpy.array(self.fleet.running[self._first :], dtype=numpy.float64)
        pairs = chances[self._layout.pairs] * shares_of(self._layout, running)
        asked = demand(self._layout, tokens_per_s, pairs, self._scenario.traffic.tokens_per_step)
        loads = self._model.loads(messages(self._layout, asked, running), running, self._waiting, tick_s, self._batch)
        self._waiting, self._batch = loads.waiting, loads.batch
        self._count(tick, loads, tick_s)
        self.fleet.advance((tick + 1) * tick_s)
        self._recent.append(loads)
        self.strategy.act(self.fleet, self._recent[0], self._first)
        return loads

    def _count(self, tick: int, loads: Loads, tick_s: float) -> None:
        totals, came = self.totals, loads.rows_per_s * tick_s
        rows = float(came.sum())
        totals.rows_in += rows
        totals.rows_served += float(loads.served.sum())
        totals.rows_waiting = float(loads.waiting.sum())
        spare_s = self._objective_s - loads.service_s
        late = numpy.where(spare_s < 0, 1.0, loads.later_than(spare_s[:, None])[:, 0])
        rows_late = float(came @ late)
        totals.rows_in_time += rows - rows_late
        totals.ticks_in_time += rows_late <= (1 - IN_TIME_SHARE) * rows
        if tick % self._histogram_every == 0:
            totals.later += came @ loads.later_than(numpy.broadcast_to(WAITS_S, (len(came), len(WAITS_S))))
            totals.rows_in_histogram += rows
        totals.wait_row_s += float(came @ loads.mean_wait_s)

    def sample(self, at_s: float, tokens_per_s: float, loads: Loads) -> Sample:
        running = numpy.array(self.fleet.running[self._first :])
        came = loads.rows_per_s / max(float(loads.rows_per_s.sum()), 1e-12)
        hot_first = numpy.argsort(-loads.rows_per_s, kind="stable")
        ends = [0, *(round(share * len(running)) for _, share in CLASSES)]
        classes = tuple(int(running[hot_first[low:high]].sum()) for low, high in itertools.pairwise(ends))
        return Sample(
            self.name,
            at_s,
            tokens_per_s,
            self.fleet.replicas,
            int(running.sum()),
            self.fleet.pending,
            self.fleet.nodes,
            float((loads.busy * running).sum() / max(1, running.sum())),
            float(came @ loads.p95_wait_s) * 1e3,
            classes,
        )
