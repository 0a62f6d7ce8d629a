"""Replicas that start, run and drain on nodes that come and go: the part of the simulation that goes by events.

Its own event loop, a heap of (time, number, event): an event is a plain record that says what is ready for which group.
With simpy it would be a generator per replica and, since what starts can be called off, an interrupt for each; loads,
which are most of the work, are no events but arrays per tick (see `lane`).
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy
from numpy.typing import NDArray

from expertmesh.simulation.layout import Layout
from expertmesh.simulation.scenario import Scenario, StartSection

Kind = Literal["wanted", "ready", "drained", "node"]
FLEET, DRAWS = 0x72, 4096
EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Event:
    kind: Kind
    group: int = -1
    count: int = 0
    """wanted: replicas from now on; ready: the number of this start."""


@dataclass
class Used:
    """Integrals up to now."""

    replica_s: float = 0.0
    """Of all replicas that hold a GPU: starting, running and draining."""
    gpu_s: float = 0.0
    node_gpu_s: float = 0.0
    """GPUs of all nodes that are there, used or not."""
    ups: int = 0
    downs: int = 0
    nodes_started: int = 0
    peak_replicas: int = 0
    peak_gpus: float = 0.0


class Fleet:
    """Replicas of all groups under one strategy. GPUs are pooled over nodes: that a replica's share of GPUs must lie on
    one node is not modelled. Replicas of the beginning run at once, on nodes that are there."""

    def __init__(self, scenario: Scenario, layout: Layout, replicas: NDArray[numpy.int64]) -> None:
        self.now = 0.0
        self.used = Used()
        self.running: list[int] = []
        self.target: list[int] = []
        """What was asked for last, though the cluster may not have heard of it yet."""
        self._wanted: list[int] = []
        self._start, self._nodes_section = scenario.start, scenario.nodes
        self._expert_bytes = scenario.model.cost.weight_bytes
        self._gpus: list[float] = []
        self._start_s: list[float] = []
        self._generator = numpy.random.default_rng((scenario.seed, FLEET))
        self._factors: list[float] = []
        self._events: list[tuple[float, int, Event]] = []
        self._numbers = itertools.count()
        self._starting: list[list[int]] = []
        """Per group the numbers of its starts, in their order."""
        self._queue: deque[int] = deque()
        """Groups whose replicas wait for a GPU, one entry each."""
        self._queued: list[int] = []
        self._gpus_queued = 0.0
        self.add(layout)
        self.running, self.target, self._wanted = replicas.tolist(), replicas.tolist(), replicas.tolist()
        self._held = int(replicas.sum())
        self._gpus_used = float(replicas @ numpy.array(self._gpus))
        self._nodes_coming = 0
        self._surplus_since: float | None = None
        self._nodes = max(self._needed_nodes(self._gpus_used), self._nodes_section.min_nodes)
        self._note_peak()

    def add(self, layout: Layout) -> None:
        """More groups, with no replica yet; they are numbered on from those that are there."""
        for group, size in zip(layout.groups, layout.sizes.tolist(), strict=True):
            self._gpus.append(group.num_gpus)
            self._start_s.append(_start_s(self._start, size * self._expert_bytes))
            self._starting.append([])
            for counts in (self.running, self.target, self._wanted, self._queued):
                counts.append(0)

    def settled(self, first: int) -> bool:
        """All groups from this number on have the replicas that were asked for."""
        return self.running[first:] == self.target[first:]

    @property
    def replicas(self) -> int:
        """That hold a GPU."""
        return self._held

    @property
    def pending(self) -> int:
        """That wait for a GPU."""
        return len(self._queue)

    @property
    def nodes(self) -> int:
        return self._nodes

    def ask(self, group: int, replicas: int, delay_s: float) -> None:
        """The strategy's wish; the cluster acts on it after the delay."""
        if replicas == self.target[group]:
            return
        self.target[group] = replicas
        self._later(delay_s, Event("wanted", group, replicas))

    def advance(self, until: float) -> None:
        """Lets all happen that is due up to then."""
        while self._events and self._events[0][0] <= until:
            at, _, event = heapq.heappop(self._events)
            self._pass(at)
            self._happen(event)
        self._pass(until)
        self._return_nodes()

    def _happen(self, event: Event) -> None:
        if event.kind == "wanted":
            self._want(event.group, event.count)
        elif event.kind == "ready":
            if event.count in self._starting[event.group]:
                self._starting[event.group].remove(event.count)
                self.running[event.group] += 1
        elif event.kind == "drained":
            self._release(event.group)
        else:
            self._nodes += 1
            self._nodes_coming -= 1
        self._place()

    def _want(self, group: int, replicas: int) -> None:
        before, self._wanted[group] = self._wanted[group], replicas
        if replicas > before:
            self.used.ups += 1
            self._queue.extend([group] * (replicas - before))
            self._queued[group] += replicas - before
            self._gpus_queued += self._gpus[group] * (replicas - before)
        for _ in range(before - replicas):
            self._remove_one(group)
        self.used.downs += replicas < before

    def _remove_one(self, group: int) -> None:
        """First what waits, then what starts, then what runs."""
        if self._queued[group]:
            self._queued[group] -= 1
            self._queue.remove(group)
            self._gpus_queued -= self._gpus[group]
        elif self._starting[group]:
            self._starting[group].pop()
            self._release(group)
        else:
            self.running[group] -= 1
            self._later(self._start.drain_s, Event("drained", group))

    def _place(self) -> None:
        """GPUs that are free go to those that wait, in their order; for the others nodes are asked for."""
        free = self._nodes * self._nodes_section.gpus - self._gpus_used
        while self._queue and self._gpus[self._queue[0]] <= free + EPSILON:
            group = self._queue.popleft()
            self._queued[group] -= 1
            free -= self._gpus[group]
            self._gpus_used += self._gpus[group]
            self._gpus_queued -= self._gpus[group]
            self._held += 1
            number = next(self._numbers)
            self._starting[group].append(number)
            self._later(self._start_s[group] * self._factor(self._start.spread), Event("ready", group, number))
        if self._queue:
            needed = self._needed_nodes(self._gpus_used + self._gpus_queued)
            for _ in range(needed - self._nodes - self._nodes_coming):
                self._nodes_coming += 1
                self.used.nodes_started += 1
                section = self._nodes_section
                self._later(section.provision_s * self._factor(section.spread), Event("node"))
        self._note_peak()

    def _release(self, group: int) -> None:
        self._held -= 1
        self._gpus_used -= self._gpus[group]

    def _return_nodes(self) -> None:
        """Gives nodes back once so many were not needed for `idle_s`."""
        least = max(self._needed_nodes(self._gpus_used), self._nodes_section.min_nodes)
        if self._queue or least >= self._nodes:
            self._surplus_since = None
        elif self._surplus_since is None:
            self._surplus_since = self.now
        elif self.now - self._surplus_since >= self._nodes_section.idle_s:
            self._nodes = least
            self._surplus_since = None

    def _needed_nodes(self, gpus: float) -> int:
        return min(self._nodes_section.max_nodes, -int(-(gpus - EPSILON) // self._nodes_section.gpus))

    def _pass(self, at: float) -> None:
        passed = at - self.now
        self.used.replica_s += passed * self._held
        self.used.gpu_s += passed * self._gpus_used
        self.used.node_gpu_s += passed * self._nodes * self._nodes_section.gpus
        self.now = at

    def _note_peak(self) -> None:
        self.used.peak_replicas = max(self.used.peak_replicas, self._held)
        self.used.peak_gpus = max(self.used.peak_gpus, self._gpus_used)

    def _later(self, after_s: float, event: Event) -> None:
        heapq.heappush(self._events, (self.now + after_s, next(self._numbers), event))

    def _factor(self, spread: float) -> float:
        if not self._factors:
            self._factors = self._generator.standard_normal(DRAWS).tolist()
        return float(numpy.exp(spread * self._factors.pop()))


def _start_s(section: StartSection, weight_bytes: float) -> float:
    return section.pull_s + section.process_s + weight_bytes / (section.load_gb_per_s * 1e9)
