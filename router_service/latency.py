"""What one exchange with a replica usually takes, and from when on an answer is late. native/src/latency.h is the same
in C++."""

from __future__ import annotations

CLASSES = 20
FACTOR = 2.0
FLOOR_S, UNKNOWN_S, CEILING_S = 0.1, 1.0, 10.0
"""An answer is late no sooner than FLOOR_S, no later than CEILING_S, and after UNKNOWN_S where nothing is known yet."""


class Latency:
    """Mean and mean deviation of the round trip for each power of two of rows: the estimator of RFC 6298.

    Begins with what is known of `peer`, where there is one.
    """

    def __init__(self, peer: Latency | None = None) -> None:
        self._classes: list[tuple[float, float] | None] = list(peer._classes) if peer else [None] * CLASSES
        """(mean, deviation), seconds."""

    @property
    def known(self) -> bool:
        """Whether anything was noted."""
        return any(self._classes)

    def note(self, rows: int, round_trip_s: float) -> None:
        number = _class_of(rows)
        known = self._classes[number]
        if known is None:
            self._classes[number] = round_trip_s, round_trip_s / 2
            return
        mean, deviation = known
        deviation += (abs(round_trip_s - mean) - deviation) / 4
        self._classes[number] = mean + (round_trip_s - mean) / 8, deviation

    def late_after_s(self, rows: int) -> float:
        """Seconds after which an answer to so many rows is late. What is known of fewer rows is scaled up."""
        wanted = _class_of(rows)
        for below in range(wanted + 1):
            if known := self._classes[wanted - below]:
                return _bounded((known[0] + 4 * known[1]) * 2.0**below)
        for known in self._classes[wanted + 1 :]:
            if known:
                return _bounded(known[0] + 4 * known[1])
        return UNKNOWN_S


def _class_of(rows: int) -> int:
    return min(CLASSES, max(1, rows).bit_length()) - 1


def _bounded(usual_s: float) -> float:
    return max(FLOOR_S, min(CEILING_S, FACTOR * usual_s))
