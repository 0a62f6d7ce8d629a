"""A replica is away for longer than steps wait: the requests that need it fail, the engine and the others live on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from router_service.losses import collect, lose

PROGRAM = Path(__file__).with_name("vllm_losses.py")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 2)),  # `mesh`, and the code beside it
}


def outcomes(program: Path, artifact: Path) -> list[dict[str, Any]]:
    """What a program of its own printed with each scheduler."""
    done = subprocess.run(
        [sys.executable, str(program), str(artifact)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def runs(demo_artifact: Path) -> list[dict[str, Any]]:
    return outcomes(PROGRAM, demo_artifact)


@pytest.mark.vllm
@pytest.mark.parametrize("scheduler", [0, 1], ids=["sync", "async"])
def test_only_the_requests_concerned_fail_and_with_no_wrong_token(runs: list[dict[str, Any]], scheduler: int) -> None:
    run = runs[scheduler]
    assert all(one["reason"] == "length" for one in run["reference"])
    reasons = [one["reason"] for one in run["without"]]
    assert set(reasons) == {"error", "length"}  # some need the expert, some do not
    for before, without in zip(run["reference"], run["without"], strict=True):
        count = len(without["tokens"])
        assert without["tokens"] == before["tokens"][:count]
        assert (count == len(before["tokens"])) == (without["reason"] == "length")


@pytest.mark.vllm
@pytest.mark.parametrize("scheduler", [0, 1], ids=["sync", "async"])
def test_once_it_is_back_all_is_as_before(runs: list[dict[str, Any]], scheduler: int) -> None:
    run = runs[scheduler]
    assert run["after"] == run["reference"]


def test_losses_are_errors_where_nobody_collects_them() -> None:
    assert not lose([1])
    with collect() as lacking:
        assert lose([3, 1]) and lose([1], degraded=[4])
    assert (lacking.lost, lacking.degraded) == ({1, 3}, {4})
    assert not lose([2])


@pytest.mark.vllm
@pytest.mark.parametrize("step", ["determine_available_memory", "compile_or_warm_up_model"])
def test_a_warm_up_takes_degraded_rows_and_no_lost_ones(step: str) -> None:
    from router_service.vllm_executor import InProcessExecutor

    executor = InProcessExecutor.__new__(InProcessExecutor)
    executor.driver_worker = SimpleNamespace(**{step: lose})
    assert executor.collective_rpc(step, args=([], [1])) == [True]
    assert executor.collective_rpc(step, args=([0], [1])) == [False]
