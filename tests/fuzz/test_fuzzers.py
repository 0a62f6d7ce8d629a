"""A few seconds of each fuzzer; `make fuzz` runs them for longer."""

from __future__ import annotations

from pathlib import Path

import pytest
from marks import needs_native

from fuzz.run import fuzz
from fuzz.targets import TARGETS


@needs_native
@pytest.mark.parametrize("name", TARGETS)
def test_a_short_run_finds_nothing(name: str, tmp_path: Path) -> None:
    with TARGETS[name](tmp_path) as target:
        outcome = fuzz(target, 4.0, seed=1)
    assert outcome.passed(), outcome.fault
    assert len(outcome.answers) >= 2, outcome
