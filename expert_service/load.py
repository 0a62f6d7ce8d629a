"""How busy a replica is and how many rows each of its experts gets."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy
import numpy.typing


class LoadMeter:
    """Busy share and rows per second, both averaged with exponentially falling weight over the last `tau_s` seconds.

    One thread records; others read. Times are seconds of a monotonic clock that the caller passes in.
    """

    def __init__(self, experts_per_layer: Mapping[int, int], now: float, tau_s: float = 1.0) -> None:
        self.rows_total = 0
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
