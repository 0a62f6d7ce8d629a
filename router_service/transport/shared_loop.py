"""An event loop that a thread of its own runs, until another thread borrows it to wait for something itself.

Who waits in the thread that runs the loop need not be woken by another one, which would cost more than the rest of an
exchange.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
IDLE_S = 0.05
"""A loop that nobody has borrowed for this long is run by its own thread again."""


class SharedLoop:
    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._running = threading.Lock()
        """Held by the thread that runs the loop."""
        self._borrowing = threading.Lock()
        self._borrowed = False
        self._returned_at = 0.0
        self._needed = threading.Event()
        """The loop's own thread is to run it at once."""
        self._closing = False
        self._thread = threading.Thread(target=self._keep_running, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Runs it there and waits for its result."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        self._needed.set()
        return future.result(timeout_s)

    @contextmanager
    def borrow(self) -> Iterator[bool]:
        """While the block runs, the loop belongs to this thread, unless it yields False: another one has it."""
        if asyncio._get_running_loop() is not None or not self._borrowing.acquire(blocking=False):
            yield False
            return
        try:
            self._borrowed = True
            if not self._running.acquire(blocking=False):
                self.loop.call_soon_threadsafe(self.loop.stop)
                self._running.acquire()
            try:
                yield True
            finally:
                self._borrowed = False
                self._returned_at = time.monotonic()
                self._running.release()
        finally:
            self._borrowing.release()

    def run_once(self) -> None:
        """Runs what is ready; only for who has borrowed it."""
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def run_until(self, done: Callable[[], bool], until: float) -> None:
        """Runs it until `done`, after which somebody must call `interrupt`, or until that time of the monotonic clock,
        what is ready by then included; only for who has borrowed it."""
        timer = self.loop.call_at(self.loop.time() + max(0.0, until - time.monotonic()), self.loop.stop)
        try:
            while not done():
                self.loop.run_forever()
                if time.monotonic() >= until:
                    return
        finally:
            timer.cancel()

    def interrupt(self) -> None:
        """Lets a borrower look again whether it is done; called on the loop."""
        if self._borrowed:
            self.loop.stop()

    def call_soon(self, call: Callable[[], object]) -> None:
        """For threads that could not borrow it."""
        self.loop.call_soon_threadsafe(call)
        self._needed.set()

    def close(self) -> None:
        """Ends the thread; nothing may run on the loop any more."""
        self._closing = True
        self._needed.set()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    def _keep_running(self) -> None:
        while not self._closing:
            with self._running:
                self._needed.clear()
                while not (self._borrowed or self._closing):
                    self.loop.run_forever()
            while self._borrowed or time.monotonic() - self._returned_at < IDLE_S:
                if self._needed.wait(IDLE_S) or self._closing:
                    break
