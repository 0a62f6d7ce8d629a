"""Two threads that compute in turns: one while the other's rows are away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_mine = threading.local()


class Turns:
    """The turn of one of two halves. It passes on whenever a half's rows go away, so that of every layer the first
    half is computed before the second, which may read what the first has written."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn = 0
        self._under_way = {0, 1}

    @contextmanager
    def of(self, half: int, begin: Callable[[], None]) -> Iterator[None]:
        """This thread computes the half while the block runs; `begin` is called at the start of each of its turns."""
        _mine.turn = (self, half, begin)
        self._take(half, begin)
        try:
            yield
        finally:
            del _mine.turn
            with self._changed:
                self._under_way.discard(half)
            self._pass(half)

    def _take(self, half: int, begin: Callable[[], None]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == half)
        begin()

    def _pass(self, half: int) -> None:
        with self._changed:
            other = 1 - half
            self._turn = other if other in self._under_way else half
            self._changed.notify_all()


@contextmanager
def away() -> Iterator[None]:
    """While the block waits, the other half computes, where this thread computes one of two; the block's end waits
    for the turn."""
    mine: tuple[Turns, int, Callable[[], None]] | None = getattr(_mine, "turn", None)
    if mine is None:
        yield
        return
    turns, half, begin = mine
    turns._pass(half)
    try:
        yield
    finally:
        turns._take(half, begin)
