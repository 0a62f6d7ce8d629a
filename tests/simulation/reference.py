"""Replicas as `expert_service` runs them, message by message: what the formulas of the simulator stand against."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Replica:
    queues: dict[int, list[float]] = field(default_factory=dict)
    """Layer -> when its waiting messages came."""
    computing: int = 0
    """Messages of the batch under way."""

    @property
    def messages(self) -> int:
        return self.computing + sum(map(len, self.queues.values()))


@dataclass(frozen=True)
class Observed:
    busy: float
    waits_s: list[float]
    batch_messages: float


def serve(
    rate: float, layers: int, replicas: int, service_s: Callable[[int], float], messages: int, seed: int
) -> Observed:
    """Poisson arrivals of `rate` messages/s, each of any layer, each to the replica with the fewest messages."""
    generator = random.Random(seed)
    tier = [Replica() for _ in range(replicas)]
    order = itertools.count()
    ends: list[tuple[float, int, Replica]] = []
    waits: list[float] = []
    busy_s, batches, now = 0.0, 0, 0.0

    def take(replica: Replica, at: float) -> None:
        nonlocal busy_s, batches
        layer = min(replica.queues, key=lambda one: replica.queues[one][0])
        came = replica.queues.pop(layer)
        waits.extend(at - one for one in came)
        replica.computing = len(came)
        took_s = service_s(len(came))
        busy_s, batches = busy_s + took_s, batches + 1
        heapq.heappush(ends, (at + took_s, next(order), replica))

    for _ in range(messages):
        now += generator.expovariate(rate)
        while ends and ends[0][0] <= now:
            at, _, replica = heapq.heappop(ends)
            replica.computing = 0
            if replica.queues:
                take(replica, at)
        least = min(one.messages for one in tier)
        replica = generator.choice([one for one in tier if one.messages == least])
        replica.queues.setdefault(generator.randrange(layers), []).append(now)
        if not replica.computing:
            take(replica, now)
    return Observed(busy_s / now / replicas, waits, len(waits) / batches)
