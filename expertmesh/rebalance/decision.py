"""Whether a new plan is worth applying now: a pure function of its gain and of what was tried before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_DOUBLINGS = 5


@dataclass(frozen=True)
class Limits:
    threshold: float = 0.1
    """Least gain, 0 to 1."""
    cool_down_s: float = 600
    """Between the end of one rebalance and the begin of the next; doubled for each that failed since the last good one,
    at most MAX_DOUBLINGS times."""
    min_rows: int = 1000
    """(row, expert) pairs in the window, below which loads say little."""


@dataclass(frozen=True)
class Look:
    """One look at the cluster; times are Unix times in seconds."""

    now: float
    rows: int
    """(row, expert) pairs observed in the window, over all layers."""
    cost_now: float
    cost_planned: float
    """What the planner minimizes, under the same loads: memory x time with weights for replicas and unevenness."""
    groups_changed: int
    """Groups that would come or go."""

    @property
    def gain(self) -> float:
        """Share of the cost that the plan saves; NaN where there is no cost."""
        return 1 - self.cost_planned / self.cost_now if self.cost_now else math.nan


@dataclass(frozen=True)
class Attempt:
    """A rebalance that is over."""

    ended_at: float
    succeeded: bool


@dataclass(frozen=True)
class Verdict:
    act: bool
    reason: str


def decide(look: Look, limits: Limits, attempts: Sequence[Attempt]) -> Verdict:
    """`attempts` oldest first."""
    if not (_is_cost(look.cost_now) and _is_cost(look.cost_planned)):
        return Verdict(False, "the loads give no figure")
    if look.rows < limits.min_rows:
        return Verdict(False, f"{look.rows} rows in the window, {limits.min_rows} are needed")
    if not look.groups_changed:
        return Verdict(False, "the groups are already as planned")
    gain = f"gain {look.gain:+.3f}"
    if look.gain <= limits.threshold:
        return Verdict(False, f"{gain}, threshold {limits.threshold:g}")
    if attempts:
        failures = _failures(attempts)
        pause_s = limits.cool_down_s * 2 ** min(failures, MAX_DOUBLINGS)
        left_s = attempts[-1].ended_at + pause_s - look.now
        if left_s > 0:
            why = f"{failures} failed" if failures else "cool-down"
            return Verdict(False, f"{gain}, but {why}: {left_s:.0f} s left")
    return Verdict(True, f"{gain}, threshold {limits.threshold:g}")


def _failures(attempts: Sequence[Attempt]) -> int:
    """In a row, up to now."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.succeeded:
            break
        count += 1
    return count


def _is_cost(value: float) -> bool:
    return math.isfinite(value) and value > 0
