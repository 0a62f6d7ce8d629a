"""Rows of a step that no replica could compute: who runs the step collects them, so that only their requests fail."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_collecting = threading.local()


@contextmanager
def collect() -> Iterator[set[int]]:
    """The rows that are lost on this thread while the block runs, by their index in the step's batch."""
    lost: set[int] = set()
    _collecting.rows = lost
    try:
        yield lost
    finally:
        del _collecting.rows


def lose(rows: Iterable[int]) -> bool:
    """Notes rows as lost; False where nobody collects, so that the loss must be an error."""
    collected: set[int] | None = getattr(_collecting, "rows", None)
    if collected is None:
        return False
    collected.update(rows)
    return True
