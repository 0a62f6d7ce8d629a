"""Rows of a step that lack an expert: who runs the step collects them; their requests alone fail or are marked."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_collecting = threading.local()


@dataclass(slots=True)
class Lacking:
    """Rows by their index in the step's batch."""

    lost: set[int] = field(default_factory=set)
    """That no replica could compute."""
    degraded: set[int] = field(default_factory=set)
    """That went on without an expert."""
    takes_lost: bool = True
    """Otherwise a lost row is an error still."""

    def __bool__(self) -> bool:
        return bool(self.lost or self.degraded)


@contextmanager
def collect(takes_lost: bool = True) -> Iterator[Lacking]:
    """The rows that lack an expert on this thread while the block runs."""
    lacking = Lacking(takes_lost=takes_lost)
    _collecting.rows = lacking
    try:
        yield lacking
    finally:
        del _collecting.rows


def lose(lost: Iterable[int], degraded: Iterable[int] = ()) -> bool:
    """Notes rows; False where nobody collects such, so that it must be an error."""
    collected: Lacking | None = getattr(_collecting, "rows", None)
    lost = frozenset(lost)
    if collected is None or (lost and not collected.takes_lost):
        return False
    collected.lost |= lost
    collected.degraded.update(degraded)
    return True
