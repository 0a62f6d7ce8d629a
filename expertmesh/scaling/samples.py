"""What replicas reported to Ray Serve's controller, as values of the policy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from expertmesh.scaling.policy import ReplicaLoad

METRICS = ("busy", "queue_wait_ms", "rows_per_s", "queued_rows")
"""Keys of `record_autoscaling_stats`, as a ReplicaLoad has them."""


class Samples:
    """Knows how long each replica has been saying nothing new. Clocks of other nodes don't matter: a sample's age is
    the time since it was first seen here."""

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[float, float]] = {}
        """Replica -> (its newest sample's time by its own clock, when that was first seen)."""

    def loads(
        self, replicas: Iterable[Any], metrics: Mapping[str, Mapping[Any, Sequence[Any]]], now: float
    ) -> tuple[ReplicaLoad, ...]:
        """One for each of the replicas that has reported all of METRICS: the newest values, NaN for what is no number.

        `metrics` are Ray's: name -> replica -> samples with `timestamp` and `value`, newest last.
        """
        seen: dict[Any, tuple[float, float]] = {}
        found = []
        for replica in replicas:
            newest = [series[-1] for name in METRICS if (series := metrics.get(name, {}).get(replica))]
            if len(newest) < len(METRICS):
                continue
            stamp = _number(newest[0].timestamp)
            known = self._seen.get(replica)
            seen[replica] = known if known and known[0] == stamp else (stamp, now)
            values = dict(zip(METRICS, (_number(one.value) for one in newest), strict=True))
            found.append(ReplicaLoad(str(getattr(replica, "unique_id", replica)), now - seen[replica][1], **values))
        self._seen = seen
        return tuple(found)


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
