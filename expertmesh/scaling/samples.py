"""What replicas reported to Ray Serve's controller, as values of the policy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import pydantic

from expertmesh.config import ScalingSection
from expertmesh.scaling.policy import ReplicaLoad

METRICS = ("busy", "queue_wait_ms", "rows_per_s", "queued_rows")
"""Keys of `record_autoscaling_stats`, as a ReplicaLoad has them."""
TARGETS = {f"scaling_{name}": name for name in ScalingSection.model_fields}
"""Keys of `record_autoscaling_stats` -> fields of a ScalingSection."""
ASKED = 15
"""Replicas. All of a group are given the same targets, so more would cost Serve's controller time and tell no more."""
Metrics = Mapping[str, Mapping[Any, Sequence[Any]]]
"""Ray's: name -> replica -> samples with `timestamp` and `value`, newest last."""


class Samples:
    """Knows how long each replica has been saying nothing new. Clocks of other nodes don't matter: a sample's age is
    the time since it was first seen here."""

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[float, float]] = {}
        """Replica -> (its newest sample's time by its own clock, when that was first seen)."""

    def loads(self, replicas: Iterable[Any], metrics: Metrics, now: float) -> tuple[ReplicaLoad, ...]:
        """One for each of the replicas that has reported all of METRICS: the newest values, NaN for what is no
        number."""
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


def targets_as_stats(targets: ScalingSection) -> dict[str, float]:
    """What a replica adds to its stats, so that its group's policy knows its targets."""
    return {key: float(getattr(targets, field)) for key, field in TARGETS.items()}


def reported_targets(replicas: Iterable[Any], metrics: Metrics) -> ScalingSection | None:
    """Those that more than half of the first ASKED replicas that say were given; None where they agree on none, or on
    what are no targets."""
    told = (
        tuple(_number(series[-1].value) for key in TARGETS if (series := metrics.get(key, {}).get(replica)))
        for replica in replicas
    )
    said = Counter(islice((one for one in told if len(one) == len(TARGETS)), ASKED))
    agreed = [one for one, count in said.items() if 2 * count > said.total()]
    if not agreed:
        return None
    try:
        return ScalingSection.model_validate(dict(zip(TARGETS.values(), agreed[0], strict=True)))
    except pydantic.ValidationError:
        return None


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
