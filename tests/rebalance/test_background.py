"""Loading a new replica's experts gives way to those that serve."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from expert_service.background import NICE, in_background


def nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


# elsewhere nothing gives way, as `background` says: there is nothing to test
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps nice values per thread")
def test_lower_priority_inside_and_the_usual_one_after() -> None:
    before = nice()
    assert in_background(nice) == min(19, before + NICE)
    assert nice() == before
    started: list[int] = []
    thread = threading.Thread(target=lambda: started.append(nice()))
    thread.start()
    thread.join()
    assert started == [before]


def test_an_error_is_the_callers() -> None:
    with pytest.raises(KeyError, match="missing"):
        in_background(lambda: {}["missing"])
