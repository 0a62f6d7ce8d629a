"""A call that is made again for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def retry(call: Callable[[], T], on: type[Exception], for_s: float, pause_s: float) -> T:
    """What `call` returns; its error where it still raises `on` after `for_s` seconds, or another one at once."""
    deadline = time.monotonic() + for_s
    while True:
        try:
            return call()
        except on:
            if time.monotonic() > deadline:
                raise
        time.sleep(pause_s)
