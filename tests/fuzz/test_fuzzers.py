"""A few seconds of each fuzzer; `make fuzz` runs them for longer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from marks import needs_native

from fuzz.run import fuzz
from fuzz.targets import TARGETS


@needs_native
@pytest.mark.parametrize("name", TARGETS)
def test_a_short_run_finds_nothing(name: str, tmp_path: Path) -> None:
    with TARGETS[name](tmp_path) as target:
        outcome = fuzz(target, 2.0, seed=1)
    assert outcome.passed(), outcome.fault
    assert len(outcome.answers) >= 2, outcome


def test_the_command_writes_its_outcomes(tmp_path: Path) -> None:
    outcomes = tmp_path / "outcomes.json"
    command = [sys.executable, "-m", "fuzz", "answer", "--seconds", "0", "--json", str(outcomes)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "answer: 1,000 executions" in done.stdout
    outcome = json.loads(outcomes.read_text())["answer"]
    assert outcome["executions"] == sum(outcome["answers"].values()) == 1000
