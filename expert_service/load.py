"""How busy a replica is, how long requests wait and how many rows each of its experts gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy
import numpy.typing

SLICES = 6
"""Seconds that count, the one that has just begun included."""
STUCK_S = 1.0
MAX_US = 2**32 - 1
BUCKETS = 240


class QueueWaits:
    """How long requests waited, over those taken in the last 5 to 6 seconds: a histogram for each second, with 8
    buckets per power of two (HdrHistogram's layout), so that a quantile is off by one part in 16 of its value at most.

    One thread records; others read. Times are seconds of a monotonic clock. `native/src/server_load.h` gives the same.
    """

    def __init__(self, now: float) -> None:
        self._taken_at = now
        self._slices: list[tuple[int, list[int]]] = [(-1, [])] * SLICES
        """(second, requests per bucket)"""

    def took(self, now: float, waits_s: Iterable[float]) -> None:
        """Requests that have waited so long were taken, perhaps none but ones whose callers have gone."""
        self._taken_at = now
        second = int(now)
        found, counts = self._slices[second % SLICES]
        if found != second:
            counts = [0] * BUCKETS
            self._slices[second % SLICES] = (second, counts)
        for wait_s in waits_s:
            counts[_bucket(min(MAX_US, max(0, round(wait_s * 1e6))))] += 1

    def quantiles(self, now: float, oldest: float | None) -> tuple[int, int]:
        """Median and 95th percentile, microseconds. `oldest`: when the request came that has waited longest; None where
        nothing waits. Where none was taken for a second, both are at least what that one has waited."""
        recent = [counts for second, counts in tuple(self._slices) if second >= 0 and int(now) - second < SLICES]
        totals = [sum(column) for column in zip(*recent, strict=True)]
        stuck_us = 0
        if oldest is not None and now - max(self._taken_at, oldest) >= STUCK_S:
            stuck_us = min(MAX_US, round((now - oldest) * 1e6))
        return max(stuck_us, _quantile(totals, 50)), max(stuck_us, _quantile(totals, 95))


def _bucket(wait_us: int) -> int:
    exponent = max(0, wait_us.bit_length() - 4)
    return 8 * exponent + (wait_us >> exponent)


def _quantile(counts: list[int], percent: int) -> int:
    """The middle of the bucket that holds it, by the nearest rank; 0 where there is nothing."""
    rank = -(-percent * sum(counts) // 100)
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if count and seen >= rank:
            if bucket < 16:
                return bucket
            exponent = bucket // 8 - 1
            return (bucket % 8 + 8 << exponent) + (1 << exponent >> 1)
    return 0


class LoadMeter:
    """Busy share and rows per second, both averaged with exponentially falling weight over the last `tau_s` seconds.

    One thread records; others read. Times are seconds of a monotonic clock that the caller passes in.
    """

    def __init__(self, experts_per_layer: Mapping[int, int], now: float, tau_s: float = 1.0) -> None:
        self.rows_total = 0
        self.waits = QueueWaits(now)
        self._tau_s = tau_s
        self._state = (now, False, 0.0, 0.0)
        """When it was last brought up to date, whether a batch was running since, busy share, rows per second."""
        self._counts = {
            layer: numpy.zeros(experts, dtype=numpy.int64) for layer, experts in sorted(experts_per_layer.items())
        }

    def _advanced(self, now: float) -> tuple[float, bool, float, float]:
        then, running, busy, rate = self._state
        fading = math.exp(-max(0.0, now - then) / self._tau_s)
        return (now, running, 1.0 - (1.0 - busy) * fading if running else busy * fading, rate * fading)

    def begin(self, now: float) -> None:
        now, _, busy, rate = self._advanced(now)
        self._state = (now, True, busy, rate)

    def end(self, now: float, layer: int, rows: int, experts: numpy.typing.NDArray[numpy.int32]) -> None:
        """A batch of `rows` rows ended whose pairs asked for `experts` [P]."""
        now, _, busy, rate = self._advanced(now)
        self._state = (now, False, busy, rate + rows / self._tau_s)
        self.rows_total += rows
        counts = self._counts[layer]
        counts += numpy.bincount(experts, minlength=len(counts))

    def busy(self, now: float) -> float:
        return self._advanced(now)[2]

    def rows_per_s(self, now: float) -> float:
        return self._advanced(now)[3]

    def expert_rows(self) -> dict[int, list[int]]:
        """MoE layer -> rows computed for each of its experts since the replica began."""
        return {layer: counts.tolist() for layer, counts in self._counts.items()}
