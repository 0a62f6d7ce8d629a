"""How many replicas a group should have: a pure function of what its replicas report and of its targets.

Written against plain values alone, so that Ray Serve's controller, the simulator and tests run the same code. They are
named tuples, which are made in a third of a frozen dataclass's time: the simulator makes tens of millions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from expertmesh.config import ScalingSection

BAND = 0.1
"""Replicas change only where the load leaves its target by more than this share of it."""
BUSY_LIMIT = 1.05
"""A busy share is 0 to 1; what lies beyond is no measurement."""
MAX_WAIT_MS = 3_600_000.0
WAIT_WINDOW_S = 6.0
"""Reported waits are those of the last seconds: for so long they tell of fewer replicas than there are by now."""
RETURN_S = 2 * WAIT_WINDOW_S
"""A replica that is back so soon has not joined: else one that comes and goes would hide the others' waits."""
STEP_DOWN_S = 3.0
"""Until a step down shows in the reports."""
IDLE_ROWS_PER_S = 1e-3


class ReplicaLoad(NamedTuple):
    """What one running replica reported, and how long ago."""

    replica: str
    age_s: float
    busy: float
    """Share of the last second or so in which it computed, 0 to 1."""
    queue_wait_ms: float
    """95th percentile over the last seconds."""
    rows_per_s: float
    queued_rows: float


class GroupLoad(NamedTuple):
    """A group at one moment. `running` replicas take rows, `target` are wanted already; times are seconds."""

    now: float
    running: int
    target: int
    replicas: tuple[ReplicaLoad, ...]
    wanted: bool = False
    """Someone waits for a group that has no replica."""


class Bounds(NamedTuple):
    min_replicas: int
    max_replicas: int

    def clip(self, replicas: int) -> int:
        return max(self.min_replicas, min(self.max_replicas, replicas))


Asked = tuple[tuple[float, int], ...]
"""(when, replicas), of those that the load asked for."""


class Memory(NamedTuple):
    """What the policy remembers from one decision to the next; its size does not grow with time."""

    since: float | None = None
    """From when on the load has been seen without a gap; None: not yet."""
    least: Asked = ()
    """Ascending in both; the first is the least asked within `up_after_s`."""
    most: Asked = ()
    """Ascending in time, descending in replicas; the first is the most asked within `down_after_s`."""
    ran: Asked = ()
    """(when, replicas that ran), as `most`; the first is the most that ran within RETURN_S."""
    joined_at: float = -math.inf
    """When more ran than within RETURN_S before."""
    stepped_at: float = -math.inf
    """When the target was last changed here."""
    last_row_at: float | None = None
    """When the group was last seen with work, or awoke; None while it has no replica."""


class Decision(NamedTuple):
    replicas: int
    asked: int
    """What the load alone asks for, before delays, steps and bounds."""
    reason: str
    """For people: one line."""
    busy: float
    """Mean over the replicas whose report counts; NaN if there is none."""
    queue_wait_ms: float
    """Lower median over them; NaN if there is none."""
    counted: int
    """Replicas whose report counts."""
    blind: bool = False
    """Replicas run, but nothing could be decided, since no report counts."""


def decide(load: GroupLoad, targets: ScalingSection, bounds: Bounds, memory: Memory) -> tuple[Decision, Memory]:
    """The replicas that the group should have from now on.

    The load asks for as many as bring the mean busy share to its target, and for more where rows wait too long. What it
    asks must hold: up for `up_after_s`, down for `down_after_s` (the stabilization windows of Kubernetes' horizontal
    pod autoscaler: the least that was asked in the one, the most in the other). Steps are limited, and each waits until
    the one before can be seen. A report that is old, not a number or impossible counts as silence; a silent replica is
    taken for as busy as the others, but for less than half of the replicas' word nothing grows, and without any report
    that counts, nothing changes.
    """
    if not load.running and not load.target:
        return _asleep(load, bounds)
    if not load.running:
        held = bounds.clip(load.target)
        return Decision(held, load.target, "the first replica starts", math.nan, math.nan, 0), Memory()
    counted = [one for one in load.replicas if _counts(one, targets.stale_after_s)]
    ran = _kept([one for one in memory.ran if one[1] > load.running], load.now, load.running, RETURN_S)
    joined = all(load.now - when > RETURN_S or count < load.running for when, count in memory.ran)
    joined_at = load.now if joined else memory.joined_at
    if not counted:
        return _blind(load, bounds), Memory(
            ran=ran,
            joined_at=joined_at,
            stepped_at=memory.stepped_at,
            last_row_at=load.now if memory.last_row_at is None else memory.last_row_at,
        )
    busy = sum([one.busy if one.busy < 1.0 else 1.0 for one in counted]) / len(counted)
    wait_ms = _lower_median([one.queue_wait_ms for one in counted])
    idle = len(counted) == load.running and all(
        one.rows_per_s < IDLE_ROWS_PER_S and not one.queued_rows for one in counted
    )
    last_row_at = memory.last_row_at if idle and memory.last_row_at is not None else load.now
    if idle and bounds.min_replicas == 0 and load.now - last_row_at >= targets.idle_after_s:
        slept = f"no row for {load.now - last_row_at:.0f} s"
        return Decision(0, 0, slept, busy, wait_ms, len(counted)), Memory(last_row_at=last_row_at)
    told_wait_ms = wait_ms if load.now - joined_at >= WAIT_WINDOW_S else 0.0
    asked, why = _asked(busy, wait_ms, told_wait_ms, load.running, targets)
    if asked > load.running and 2 * len(counted) < load.running:
        asked, why = load.running, f"{why}, but only {len(counted)} of {load.running} replicas report"
    memory = Memory(
        since=load.now if memory.since is None else memory.since,
        least=_kept([one for one in memory.least if one[1] < asked], load.now, asked, targets.up_after_s),
        most=_kept([one for one in memory.most if one[1] > asked], load.now, asked, targets.down_after_s),
        ran=ran,
        joined_at=joined_at,
        stepped_at=memory.stepped_at,
        last_row_at=last_row_at,
    )
    replicas, why = _settle(load, asked, why, memory, targets)
    bounded = bounds.clip(max(1, replicas))
    if bounded != replicas:
        why += f"; bounds {bounds.min_replicas} to {bounds.max_replicas}"
    if bounded != load.target:
        memory = memory._replace(stepped_at=load.now)
    return Decision(bounded, asked, why, busy, wait_ms, len(counted)), memory


def _asleep(load: GroupLoad, bounds: Bounds) -> tuple[Decision, Memory]:
    replicas = bounds.clip(1 if load.wanted else 0)
    reason = "below its least replicas" if replicas else "asleep"
    if load.wanted:
        reason = "asleep, rows wait"
    return Decision(replicas, 0, reason, math.nan, math.nan, 0), Memory()


def _blind(load: GroupLoad, bounds: Bounds) -> Decision:
    reason = f"no report of {load.running} running replicas counts; nothing changes"
    return Decision(bounds.clip(load.target), load.target, reason, math.nan, math.nan, 0, blind=True)


def _counts(one: ReplicaLoad, stale_after_s: float) -> bool:
    """False for whatever is no number: NaN compares false with all."""
    return (
        0 <= one.age_s <= stale_after_s
        and 0 <= one.busy <= BUSY_LIMIT
        and 0 <= one.queue_wait_ms <= MAX_WAIT_MS
        and 0 <= one.rows_per_s < math.inf
        and 0 <= one.queued_rows < math.inf
    )


def _asked(busy: float, wait_ms: float, told_wait_ms: float, running: int, targets: ScalingSection) -> tuple[int, str]:
    """Replicas that the load asks for.

    More for waiting only where replicas are busy at all and as many as now have been there for long enough
    (`told_wait_ms`): a wait without work is no load, and what more replicas bring is known no better than by their
    limit per step. Fewer only where the rest would keep both targets, if waits grow as in a queue with one server,
    with u / (1 - u) for a busy share of u (Pollaczek 1930, Khinchine 1932).
    """
    pressure, why = busy / targets.target_busy, f"busy {busy:.0%} of {targets.target_busy:.0%}"
    waiting = min(told_wait_ms / targets.queue_wait_ms, targets.max_up_factor)
    if waiting > max(1.0, pressure) and busy >= targets.target_busy / 2:
        pressure, why = waiting, f"rows wait {wait_ms:.0f} ms of {targets.queue_wait_ms:g}"
    if abs(pressure - 1) <= BAND:
        return running, why
    if pressure > 1:
        return math.ceil(running * pressure), why
    by_wait = busy + (1 - busy) * wait_ms / ((1 - BAND) * targets.queue_wait_ms)
    by_busy = pressure / (1 - BAND)
    if by_wait > by_busy:
        why += f", rows wait {wait_ms:.0f} ms"
    return max(1, min(running, math.ceil(running * max(by_busy, by_wait)))), why


def _kept(others: list[tuple[float, int]], now: float, asked: int, window_s: float) -> Asked:
    """With what is asked now, without what has become too old to matter. Of each window only those values are kept that
    may yet be its extreme (as in Lemire 2006): no more than there are different ones."""
    while others and now - others[0][0] > window_s:
        del others[0]
    return (*others, (now, asked))


def _settle(load: GroupLoad, asked: int, why: str, memory: Memory, targets: ScalingSection) -> tuple[int, str]:
    """The load's wish after delays and steps, seen from the replicas that are wanted already."""
    least, most = memory.least[0][1], memory.most[0][1]
    seen_s = load.now - (load.now if memory.since is None else memory.since)
    stepped_s = load.now - memory.stepped_at
    if least > load.target and seen_s >= targets.up_after_s and stepped_s >= targets.up_after_s:
        limit = min(math.ceil(load.target * targets.max_up_factor), load.target + targets.max_up_step)
        return min(least, limit), why
    if most < load.target and seen_s >= targets.down_after_s and stepped_s >= min(STEP_DOWN_S, targets.down_after_s):
        return max(most, load.target - targets.max_down_step), why
    if asked != load.target:
        return load.target, f"{why}; asks for {asked}, not long enough yet"
    return load.target, why


def _lower_median(values: Iterable[float]) -> float:
    """Of an even number the lower of both, so that one of two cannot lift it."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]
