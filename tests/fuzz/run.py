"""Trying batch after batch for a time, and what came of it."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import psutil

MIB = 2**20


class Fault(Exception):
    """What must never be: one line with the message that does it."""


class Hang(Fault):
    """No answer in time."""


class Target(Protocol):
    limit_mib: int
    """By how much its process may grow beyond what it takes after the first batch."""
    pid: int

    def batch(self, chance: random.Random) -> Counter[str]:
        """Sends some messages; returns how many were answered in which way. Raises Fault."""
        ...


@dataclass
class Outcome:
    seconds: float = 0.0
    executions: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    crashes: int = 0
    hangs: int = 0
    beyond_the_limit: int = 0
    peak_growth_mib: int = 0
    limit_mib: int = 0
    fault: str = ""

    def passed(self) -> bool:
        return not self.fault


def fuzz(target: Target, seconds: float, seed: int) -> Outcome:
    """Until the time is over or something is wrong. The same seed tries the same messages in the same order."""
    chance = random.Random(seed)
    outcome, began = Outcome(limit_mib=target.limit_mib), time.monotonic()
    memory = psutil.Process(target.pid).memory_info
    before = 0
    try:
        while not outcome.executions or time.monotonic() < began + seconds:
            answers = target.batch(chance)
            outcome.answers += answers
            outcome.executions += answers.total()
            before = before or memory().rss
            outcome.peak_growth_mib = max(outcome.peak_growth_mib, (memory().rss - before) // MIB)
            if outcome.peak_growth_mib > target.limit_mib:
                outcome.beyond_the_limit += 1
                raise Fault(f"it grew by {outcome.peak_growth_mib} MiB; {target.limit_mib} are allowed")
    except Hang as fault:
        outcome.hangs, outcome.fault = 1, str(fault)
    except Fault as fault:
        outcome.crashes, outcome.fault = 1 - outcome.beyond_the_limit, str(fault)
    except Exception as error:  # noqa: BLE001 any of what is fuzzed is a crash of it
        outcome.crashes, outcome.fault = 1, f"{type(error).__name__}: {error}"
    outcome.seconds = round(time.monotonic() - began, 1)
    return outcome
