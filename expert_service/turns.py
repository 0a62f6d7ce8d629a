"""Whose rows are computed next where several routers wait, and who may still wait.

native/src/server_turns.h is the same in C++.
"""

from __future__ import annotations

from dataclasses import dataclass, field


def may_wait(rows: int, own_rows: int, callers: int, queued_rows: int, max_queued_rows: int) -> bool:
    """Whether `rows` more of a caller that has `own_rows` waiting still fit; `callers` wait, this one included.

    A full queue takes a caller's first message and, up to an equal share of the queue, more: never more than twice
    `max_queued_rows` wait.
    """
    if queued_rows + rows <= max_queued_rows:
        return True
    share = max_queued_rows // callers if own_rows else max_queued_rows
    return own_rows + rows <= share and queued_rows + rows <= 2 * max_queued_rows


@dataclass(slots=True)
class _Caller:
    rows: int = 0
    """That wait."""
    next_turn: int = 0


@dataclass(slots=True)
class Turns:
    """Start-time fair queueing (Goyal, Vin, Cheng 1996): a job's turn is where its caller's last one ends, counted in
    rows, or now, if that is later. What has the least turn is computed first: of callers that always wait each gets as
    many rows, and nobody saves up turns while it has nothing to send."""

    _now: int = 0
    _callers: dict[object, _Caller] = field(default_factory=dict)

    def rows_of(self, caller: object) -> int:
        known = self._callers.get(caller)
        return known.rows if known else 0

    def callers_with(self, caller: object) -> int:
        """How many have rows that wait, if this one had some."""
        return sum(one.rows > 0 for one in self._callers.values()) + (self.rows_of(caller) == 0)

    def join(self, caller: object, rows: int) -> int:
        """The turn of a job that begins to wait."""
        known = self._callers.setdefault(caller, _Caller())
        turn = max(self._now, known.next_turn)
        known.next_turn = turn + max(1, rows)
        known.rows += rows
        return turn

    def leave(self, caller: object, rows: int) -> None:
        """A job waits no longer."""
        self._callers[caller].rows -= rows

    def advance(self, turn: int | None) -> None:
        """The least turn that waited has come; None: nothing waits any more."""
        if turn is None:
            self._now, self._callers = 0, {}
            return
        self._now = turn
        self._callers = {who: one for who, one in self._callers.items() if one.rows or one.next_turn > turn}
