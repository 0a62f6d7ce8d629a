"""Strategies side by side, a process each: they share nothing but the scenario."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection, wait

from expertmesh.child_process import spawn
from expertmesh.errors import ConfigError, ExpertMeshError
from expertmesh.simulation.course import Course, Told, course
from expertmesh.simulation.scenario import Scenario, StrategyName

TELL_S = 0.1
"""How often a process says how far it is."""
Word = int | Course | ConfigError
"""Ticks done, or how it ended."""


class ProcessEnded(ExpertMeshError):
    """A strategy's process that was killed or failed before its last tick."""


def courses_apart(scenario: Scenario, progress: Told) -> tuple[Course, ...]:
    """In the scenario's order; `progress` is told the mean of all. Raises ConfigError as `course` does, and
    ProcessEnded."""
    runs: list[_Run] = []
    try:
        runs.extend(_Run(scenario, name) for name in scenario.strategies)
        while pending := [one for one in runs if one.found is None]:
            ready = wait([one.connection for one in pending])
            for one in pending:
                if one.connection in ready:
                    one.receive()
            progress(sum(one.ticks for one in runs) // len(runs))
    finally:
        for one in runs:
            one.close()
    return tuple(one.found for one in runs if one.found is not None)


class _Run:
    """One strategy's process."""

    def __init__(self, scenario: Scenario, name: StrategyName) -> None:
        self.ticks = 0
        self.found: Course | None = None
        self._all_ticks = scenario.ticks
        self._process, self.connection = spawn(_work, scenario, name, name=name)

    def receive(self) -> None:
        try:
            word: Word = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise ProcessEnded(
                f"simulate: the process of {self._process.name} ended before its last tick "
                f"(exit code {self._process.exitcode})"
            ) from None
        if isinstance(word, ConfigError):
            raise word
        if isinstance(word, int):
            self.ticks = word
        else:
            self.ticks, self.found = self._all_ticks, word

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _work(connection: Connection, scenario: Scenario, name: StrategyName) -> None:
    """Ends, with nobody to hear it, where the process that asked for it is gone."""
    told_s = 0.0

    def tell(ticks: int) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= TELL_S:
            connection.send(ticks)
            told_s = time.monotonic()

    try:
        connection.send(course(scenario, name, tell))
    except ConfigError as error:
        connection.send(error)
    except BrokenPipeError:
        return
