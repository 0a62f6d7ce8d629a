"""How busy replicas are and how long messages wait, when all that waits for a layer is computed together; pure.

A group's N replicas hold L layers each. A message of some layer goes to the replica with the least to do. A free
replica takes the layer whose first message has waited longest, with all that waits for it, and computes that in time S.
So at most L batches wait in a replica, and while one of a layer waits, further messages join it and form none: a queue
with a finite source (the machine repair model; Kleinrock, Queueing Systems I, 1975) of L places per replica.

One replica: exact for Poisson arrivals, equal layers and a constant S. The number of layers that wait when a batch
begins is a Markov chain, as in the embedded chain of M/G/1 bulk service (Bailey 1954); for L = 1 it is that queue.
Several: while some are free, Erlang's weights; while all compute, the same chain with N * L places and one server N
times as fast, and the chance of that such that as much is computed as comes. Of n batches that wait then, the least
loaded replica has floor(n / N). How far this is from real replicas, `python -m benchmarks simulation_error` measures.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

Floats = NDArray[numpy.float64]
Indices = NDArray[numpy.int64]

MAX_REPLICAS = 96
"""Larger groups wait as if they had so many: a little too long."""
MAX_KNOTS = 16
"""Waits are told apart up to so many service times."""
PER_SERVICE = 4
"""Points of a wait's distribution per service time."""
PHASES: Floats = (numpy.arange(8) + 0.5) / 8
"""Of a service, at which messages come."""
EXACT_PLACES = 24
LOADS: Floats = numpy.concatenate(
    [
        [0.0],
        numpy.geomspace(1e-3, 0.2, 12, endpoint=False),
        numpy.linspace(0.2, 1.6, 71),
        numpy.geomspace(1.65, 200, 30),
    ]
)
"""Messages per replica and service time for which tables hold figures."""


@dataclass(frozen=True)
class Table:
    """Of L layers and N replicas; X the loads in LOADS. Waits are in service times."""

    busy: Floats
    """[X] share of time in which a replica computes."""
    mean_wait: Floats
    """[X]"""
    beyond: Floats
    """[X, Y] share of messages that wait longer than y / PER_SERVICE."""


@functools.cache
def table(layers: int, replicas: int) -> Table:
    knots = PER_SERVICE * (min(layers, MAX_KNOTS) + 1) + 1
    found = _one if replicas == 1 else functools.partial(_several, replicas=replicas)
    rows = [(0.0, 0.0, numpy.zeros(knots)), *(found(layers, x=x, knots=knots) for x in LOADS[1:].tolist())]
    busy, mean_wait, beyond = zip(*rows, strict=True)
    return Table(numpy.array(busy), numpy.array(mean_wait), numpy.array(beyond))


def _one(layers: int, x: float, knots: int) -> tuple[float, float, Floats]:
    """Busy share, mean wait and the wait's distribution of one replica that gets `x` messages per service time."""
    begins, stays_idle = _at_begin(layers, x)
    busy = x / (x + stays_idle)
    mean, beyond = 0.0, numpy.zeros(knots)
    for phase in PHASES.tolist():
        waiting = begins @ _filled(layers, -x * phase / layers)
        ahead = _ahead(waiting, layers)
        mean += float(ahead @ numpy.arange(layers + 1)) + 1 - phase
        beyond += _beyond(ahead, numpy.array([1 - phase]), knots)
    return busy, busy * mean / len(PHASES), busy * beyond / len(PHASES)


def _several(layers: int, replicas: int, x: float, knots: int) -> tuple[float, float, Floats]:
    """The same of one of `replicas` replicas, each of which gets `x` messages per service time."""
    places = replicas * layers
    queue = _queue(places, x) if places <= EXACT_PLACES else _long_queue(places, x)
    idle = _idle_share(replicas, x)
    joining = float(queue @ numpy.arange(places + 1)) / places
    # what the replicas compute is what comes but for what joins: 1 - (1 - all_busy) idle = x (1 - all_busy joining)
    all_busy = min(1.0, max(0.0, (x - 1 + idle) / (idle + x * joining)))
    mean, beyond = 0.0, numpy.zeros(knots)
    for spare in range(replicas):
        waiting = numpy.zeros(layers + 1)
        found = queue[spare::replicas]
        waiting[: len(found)] = found
        ahead = _ahead(waiting, layers)
        # the least loaded are those that began last
        residuals = 1 - PHASES * (1 - spare / replicas)
        mean += float(ahead @ numpy.arange(layers + 1)) + float(waiting.sum() * residuals.mean())
        beyond += _beyond(ahead, residuals, knots) / len(PHASES)
    return 1 - (1 - all_busy) * idle, all_busy * mean, all_busy * beyond


def _at_begin(places: int, x: float) -> tuple[Floats, float]:
    """[places] chances that so many batches wait just after one has begun; the chance that none waits at its end."""
    reached = _filled(places, -x / places)
    step = reached[:, 1:].copy()
    step[:, 0] += reached[:, 0]
    equations = step.T - numpy.eye(places)
    equations[-1] = 1.0
    found = numpy.linalg.solve(equations, numpy.eye(places)[-1])
    begins = numpy.clip(found, 0, None) / numpy.clip(found, 0, None).sum()
    return begins, float(begins @ reached[:, 0])


def _queue(places: int, x: float) -> Floats:
    """[places + 1] chances that so many batches wait while all replicas compute: together they are one server that is
    so many times as fast."""
    begins, _ = _at_begin(places, x)
    phases = [begins @ _filled(places, -x * phase / places) for phase in PHASES.tolist()]
    return numpy.asarray(numpy.mean(phases, axis=0))


def _long_queue(places: int, x: float) -> Floats:
    """The same for many places: the birth-death chain of exponential service, each ratio r of neighbours thinned to
    r / (2 - r), by which the queue of M/M/1 has the mean of M/D/1's; beyond 1 by symmetry."""
    ratio = x * (1 - numpy.arange(places) / places)
    thinned = numpy.where(ratio < 1, ratio / numpy.maximum(2 - ratio, 1e-9), 2 * ratio - 1)
    logs = numpy.concatenate([[0.0], numpy.cumsum(numpy.log(thinned))])
    return numpy.asarray(numpy.exp(logs - numpy.logaddexp.reduce(logs)))


def _idle_share(replicas: int, x: float) -> float:
    """Mean share of free replicas while some are free: Erlang's weights below N."""
    logs = numpy.concatenate([[0.0], numpy.cumsum(numpy.log(x * replicas / numpy.arange(1, replicas)))])
    weights = numpy.exp(logs - numpy.logaddexp.reduce(logs))
    return float(1 - weights @ numpy.arange(replicas) / replicas)


def _filled(places: int, log_empty: float) -> Floats:
    """[W, W + 1]: from so many filled places to so many, once each empty one has stayed so with this chance."""
    choose, more, left = _steps(places)
    filled: Floats = numpy.exp(choose + more * numpy.log(-numpy.expm1(log_empty)) + left * log_empty)
    return filled


@functools.lru_cache(maxsize=256)
def _steps(places: int) -> tuple[Floats, Floats, Floats]:
    """Logarithms of binomial coefficients, -inf where a place would become empty; places that are filled and left."""
    logs = numpy.concatenate([[0.0], numpy.log(numpy.arange(1, places + 1)).cumsum()])
    before, after = numpy.ogrid[:places, : places + 1]
    more = numpy.maximum(after - before, 0)
    choose = logs[places - before] - logs[more] - logs[places - after]
    return numpy.where(after < before, -numpy.inf, choose), more.astype(float), (places - after).astype(float)


def _ahead(waiting: Floats, layers: int) -> Floats:
    """waiting [L + 1] chances of so many waiting layers -> [L + 1] chances of so many batches ahead of a message that
    comes: it joins its layer's batch where that waits already, at any place, and goes behind all others otherwise."""
    counts = numpy.arange(layers + 1)
    ahead = waiting * (1 - counts / layers)
    # a batch at place j of n: every n > j adds 1 / L
    ahead[:-1] += (waiting / layers)[::-1].cumsum()[::-1][1:]
    return ahead


def _beyond(ahead: Floats, residuals: Floats, knots: int) -> Floats:
    """Sum over the residuals of the chances [Y] to wait longer than y / PER_SERVICE."""
    later = numpy.concatenate([ahead[::-1].cumsum()[::-1], [0.0]])
    needed = numpy.arange(knots)[:, None] / PER_SERVICE - residuals
    first = numpy.clip(numpy.floor(needed).astype(int) + 1, 0, len(ahead))
    total: Floats = later[first].sum(axis=1)
    return total
