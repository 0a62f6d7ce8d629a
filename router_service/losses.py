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

    def __bool__(self) -> bool:
        return bool(self.lost or self.degraded)


@contextmanager
def collect() -> Iterator[Lacking]:
    """The rows that lack an expert on this thread while the block runs."""
    lacking = Lacking()
    _collecting.rows = lacking
    try:
        yield lacking
    finally:
        del _collecting.rows


def lose(lost: Iterable[int], degraded: Iterable[int] = ()) -> bool:
    """Notes rows; False where nobody collects, so that it must be an error."""
    collected: Lacking | None = getattr(_collecting, "rows", None)
    if collected is None:
        return False
    collected.lost.update(lost)
    collected.degraded.update(degraded)
    return True
