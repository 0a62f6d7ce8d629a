"""An event loop whose timers are good to some tens of microseconds; asyncio's own are rounded up to milliseconds."""

from __future__ import annotations

import asyncio
import select
import selectors
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_precisely(main: Coroutine[Any, Any, Result]) -> Result:
    """As asyncio.run."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main)


def new_loop() -> asyncio.AbstractEventLoop:
    """asyncio's own loop where there is no epoll."""
    return asyncio.SelectorEventLoop(PreciseSelector()) if sys.platform == "linux" else asyncio.new_event_loop()


if sys.platform == "linux":

    class PreciseSelector(selectors.EpollSelector):
        """Waits by select(2) on epoll's own descriptor: its timeout counts in microseconds."""

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            if timeout is not None and timeout > 0:
                select.select([self], [], [], timeout)
                timeout = 0
            return super().select(timeout)
