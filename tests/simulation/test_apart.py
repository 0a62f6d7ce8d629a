"""A process for each strategy: the same results, and one line where one does not come to its end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from simulation.scenarios import SMALL, scenario

from expertmesh.errors import ConfigError
from expertmesh.simulation.apart import ProcessEnded
from expertmesh.simulation.results import summarize
from expertmesh.simulation.run import simulate

LONG_S = 2_000_000
"""Of a scenario that a test does not wait for."""


def test_results_are_those_of_one_process() -> None:
    described = scenario(traffic__noise=0.1, strategies=["uniform", "planned", "groups", "static_mean"], planner={})
    told: list[int] = []
    apart, together = simulate(described, told.append, apart=True), simulate(described)
    assert summarize(apart) == summarize(together)
    assert apart.samples == together.samples
    assert [one.running for one in apart.courses] == [one.running for one in together.courses]
    assert told == sorted(told) and told[-1] == described.ticks


def test_a_process_that_is_killed_is_named_and_the_others_end() -> None:
    def kill_uniform(_: int) -> None:
        for child in multiprocessing.active_children():
            if child.name == "uniform":
                child.kill()

    with pytest.raises(ProcessEnded, match=r"the process of uniform ended before its last tick \(exit code -9\)"):
        simulate(scenario(duration_s=LONG_S), kill_uniform, apart=True)
    assert not {child.name for child in multiprocessing.active_children()} & {"groups", "uniform", "static_peak"}


def test_what_a_strategy_refuses_comes_through() -> None:
    described = scenario(planner={"memory_gib": 1e-6}, strategies=["groups", "planned"])
    with pytest.raises(ConfigError, match="cannot hold one expert") as apart:
        simulate(described, apart=True)
    with pytest.raises(ConfigError) as together:
        simulate(described)
    assert str(apart.value) == str(together.value)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_command(tmp_path: Path, by: signal.Signals) -> None:
    file = tmp_path / "scenario.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "duration_s": LONG_S}))
    command = [sys.executable, "-m", "expertmesh", "simulate", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        children = _wait_for_children(process.pid, 4)
        os.kill(process.pid, by)
        _, told = process.communicate(timeout=60)
    assert "Traceback" not in told, "of the command or of one of its processes"
    until_s = time.monotonic() + 60
    while alive := [pid for pid in children if _runs(pid)]:
        assert time.monotonic() < until_s, f"still there: {alive}"
        time.sleep(0.05)


def _wait_for_children(pid: int, count: int) -> list[int]:
    """Those that run Python's own helper for semaphores aside."""
    until_s = time.monotonic() + 60
    while True:
        found = [
            int(child)
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
        if len(found) == count:
            return found
        assert time.monotonic() < until_s, f"{len(found)} of {count} processes"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
