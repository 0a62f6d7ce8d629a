"""Whether a replica that is idle is still there: it is asked on its stream for an answer that costs it nothing.

All that comes of its silence is that it gets no rows meanwhile. gRPC's keep-alive, which closes connections, takes its
time: a process that is merely starved would lose the rows that it has, and all routers would connect again at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LOOK_S, LOOKS = 0.15, 3
"""A replica is asked at every third look, and silent if it has not answered by the third look after that: looks, not
seconds, so that a router that was held up itself sees what has arrived meanwhile first."""
NO_LAYER = 2**32 - 1
"""A layer that no replica serves: each answers so at once, whatever it computes."""

Answered = Callable[[], bool | None]
"""Whether the answer is there; None: it will not come any more."""


@dataclass(slots=True)
class Pulse:
    """Of one replica."""

    ask: Callable[[], Answered]
    idle: Callable[[], bool]
    """Whether no answer is awaited from it: of those that are, it is known when they are late."""
    _answered: Answered | None = None
    _looks: int = 0

    def look(self) -> bool | None:
        """Called every LOOK_S: True where the replica has answered, False where it is silent, None where neither is
        new."""
        answered = self._answered() if self._answered is not None else False
        if answered:
            self._answered = None
        self._looks = (self._looks + 1) % LOOKS
        if self._looks == 0:
            silent = self._answered is not None
            if answered is None or (self._answered is None and self.idle()):
                self._answered = self.ask()
            if silent:
                return False
        return True if answered else None
