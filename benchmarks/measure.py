"""Alternating rounds, medians and percentiles: how every benchmark compares things."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

WARM_UP, ROUNDS = 1, 5


def alternate(runs: Mapping[str, Callable[[], T]], rounds: int = ROUNDS, warm_up: int = WARM_UP) -> dict[str, list[T]]:
    """Calls every run once per round, in turns, so that a slow minute hits all of them; name -> what each round gave.

    Every other round goes the other way round. Warm-up rounds come first and are not counted.
    """
    found: dict[str, list[T]] = {name: [] for name in runs}
    for number in range(warm_up + rounds):
        for name in reversed(list(runs)) if number % 2 else runs:
            given = runs[name]()
            if number >= warm_up:
                found[name].append(given)
    return found


def timed(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` calls."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def median(figures: Sequence[float]) -> float:
    return statistics.median(figures)


def percentile(figures: Sequence[float], share: float) -> float:
    """The smallest figure that at least `share` (0 to 1) of them do not exceed."""
    ordered = sorted(figures)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median_percentile(rounds: Sequence[Sequence[float]], share: float) -> float:
    """The percentile of every round, and of these the median."""
    return median([percentile(figures, share) for figures in rounds])


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over the rounds of above / below: both of one round, so that a slow minute cancels out."""
    return median([one / other for one, other in zip(above, below, strict=True)])


def slope(points: Mapping[float, float]) -> float:
    """Of the straight line nearest to the points (x -> y), by least squares; needs two x at least."""
    return statistics.linear_regression(list(points), list(points.values())).slope
