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
    with share(lacking):
        yield lacking


@contextmanager
def share(lacking: Lacking | None, first_row: int = 0) -> Iterator[None]:
    """This thread's rows belong to `lacking` while the block runs, from `first_row` of the step's on; None: nobody
    collects them."""
    before = collected()
    _collecting.rows = lacking, first_row
    try:
        yield
    finally:
        _collecting.rows = before


def collected() -> tuple[Lacking | None, int]:
    """What this thread's rows belong to, and which of the step's rows is its first."""
    found: tuple[Lacking | None, int] = getattr(_collecting, "rows", (None, 0))
    return found


def lose(lost: Iterable[int], degraded: Iterable[int] = ()) -> bool:
    """Notes rows; False where nobody collects such, so that it must be an error."""
    (lacking, first_row), lost = collected(), frozenset(lost)
    if lacking is None or (lost and not lacking.takes_lost):
        return False
    lacking.lost.update(first_row + row for row in lost)
    lacking.degraded.update(first_row + row for row in degraded)
    return True
