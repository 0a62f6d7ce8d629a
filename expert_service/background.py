"""Work that must not disturb those who serve on the same cores, such as loading weights."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

NICE = 10
"""Added to the thread's nice value: about a tenth of the weight of others where cores are short."""


def in_background(call: Callable[[], T]) -> T:
    """The call's result, computed on a thread of low priority while the caller waits.

    Linux keeps nice values per thread, and to lower one again takes a privilege: so it is a thread of its own, which
    ends with the call, and threads that are started elsewhere have the usual priority.
    """
    with ThreadPoolExecutor(1, "background", _step_back) as pool:
        return pool.submit(call).result()


def _step_back() -> None:
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICE))
