"""How sure a figure is: Student's t over the repeats of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean over the repeats and, from two of them on, the bounds that hold the true mean with LEVEL."""

    value: float
    low: float | None
    high: float | None
    per_repeat: tuple[float, ...]


def estimate(values: Sequence[float]) -> Estimate:
    """`values`: one per repeat, at least one."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None, None, tuple(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * float(stats.sem(values))
    return Estimate(mean, mean - half, mean + half, tuple(values))


@dataclass(frozen=True)
class Difference:
    """after - before, of the means."""

    value: float
    low: float | None
    high: float | None

    @property
    def certain(self) -> bool | None:
        """Whether 0 is outside the bounds; None where there are none."""
        return None if self.low is None or self.high is None else not self.low <= 0 <= self.high


def difference(before: Sequence[float], after: Sequence[float], *, paired: bool = False) -> Difference:
    """Bounds by Welch's t, where both sides have two repeats and more; by the paired t where each repeat after was sent
    what the one in its place before was."""
    value = float(numpy.mean(after) - numpy.mean(before))
    if paired:
        found = estimate([later - earlier for earlier, later in zip(before, after, strict=True)])
        return Difference(found.value, found.low, found.high)
    if min(len(before), len(after)) < 2:
        return Difference(value, None, None)
    if numpy.ptp(before) == numpy.ptp(after) == 0:
        return Difference(value, value, value)
    bounds = stats.ttest_ind(after, before, equal_var=False).confidence_interval(LEVEL)
    return Difference(value, float(bounds.low), float(bounds.high))
