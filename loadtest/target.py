"""What a run talks to: the seam between the schedule and the wire."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from loadtest.records import Status


@dataclass(frozen=True, slots=True)
class Clock:
    """The run's time: seconds since `began`, a value of time.monotonic()."""

    began: float

    def now(self) -> float:
        return time.monotonic() - self.began


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the schedule wants it."""

    index: int
    turn: int
    seed: int
    """Of all that is random within the request: its text, or its rows and experts."""
    scheduled_s: float
    prompt_tokens: int
    """Or rows of a dispatch."""
    output_tokens: int
    cancel_after: int | None = None
    """Hang up when this many token events have come."""
    domain: str = ""
    prefix: int | None = None
    """Which of the shared prefixes it begins with."""
    prefix_tokens: int = 0
    blocks: tuple[int, ...] = ()
    """A trace's prefix blocks: equal numbers, equal text."""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns of the session: (what was asked, what was answered)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of it; fields as in RequestRecord."""

    sent_s: float
    token_times: tuple[float, ...]
    done_s: float
    prompt_tokens: int
    output_tokens: int
    status: Status
    error: str = ""
    asked: str = ""
    """What this turn added to the conversation, for the next one's history; likewise `answered`."""
    answered: str = ""


class Exchange(Protocol):
    """A request that is ready to go: all that costs time has been done."""

    async def run(self, clock: Clock) -> Outcome:
        """Sends it now and follows it to its end. Never raises for what the server does; when cancelled, raises
        CancelledError after `partial` can tell what came until then."""
        ...

    def partial(self, clock: Clock) -> Outcome:
        """What has come so far, as `unfinished`."""
        ...


class Target(Protocol):
    """Lives in a client process, on its event loop."""

    async def open(self) -> None:
        """Connects; raises ExpertMeshError with one line where that fails."""
        ...

    def prepare(self, request: Request) -> Exchange:
        """Builds the message, ahead of its time."""
        ...

    async def close(self) -> None: ...
