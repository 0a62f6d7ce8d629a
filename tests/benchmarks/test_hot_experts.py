"""What `hot_experts` makes of what it saw, and the picture of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hot_experts import DURATION_S, SLO_MS, WINDOW_S, Run, attainment, reaction, replica_seconds, starts
from benchmarks.token_steps import TokenStep
from expertmesh.errors import ClusterError
from expertmesh.v1 import directory_pb2


def test_replica_seconds_are_of_the_run_alone() -> None:
    held = [(at, {"a": 1, "b": 1}) for at in (0.5, 1.5, DURATION_S + 20)]
    assert replica_seconds(held) == pytest.approx(2 * DURATION_S)
    grown = [(10.0, {"a": 1}), (20.0, {"a": 3})]
    assert replica_seconds(grown) == pytest.approx(10 + 10 * 2 + 3 * (DURATION_S - 20))


def test_starts_are_counted_by_group() -> None:
    assert starts([(0, {"a": 1, "b": 2}), (1, {"a": 2, "b": 1}), (2, {"a": 3, "b": 1})]) == 2


def test_attainment_is_of_windows() -> None:
    fast, slow = SLO_MS / 2000, SLO_MS / 500
    steps = [TokenStep(WINDOW_S * number, 0.0, slow if number == 1 else fast) for number in range(4)]
    assert attainment(steps) == 0.75
    assert attainment(steps, [WINDOW_S + 1, WINDOW_S + 2]) == 1.0


def test_reaction_is_told_from_the_start_of_the_replica() -> None:
    change = directory_pb2.ScalingDecision(group="a", target=2, target_before=1, decided_at=1013.0)
    seen: Any = Run(load=None, began_unix_s=1000.0, changes=[change])  # type: ignore[arg-type]
    seen.ready_s = {"first": ("a", 0.0), "other": ("b", 14.0), "second": ("a", 17.0)}
    with pytest.raises(ClusterError, match="no row on a new replica"):
        reaction(seen, 8.0, "a")
    seen.first_row_s = {"first": 0.0, "second": 17.5}
    assert reaction(seen, 8.0, "a") == {"reaction_s": 17.5 - 8 - 4, "replica_start_s": 4.0}
    with pytest.raises(ClusterError, match="grew before 14 s"):
        reaction(seen, 14.0, "a")


def test_the_picture(tmp_path: Path) -> None:
    def picture(content: object) -> subprocess.CompletedProcess[str]:
        (tmp_path / "result.json").write_text(json.dumps(content))
        command = [sys.executable, "-m", "examples.pictures", "replicas"]
        files = [str(tmp_path / "result.json"), str(tmp_path / "images" / "made.svg")]
        return subprocess.run([*command, *files], capture_output=True, text=True, timeout=120, check=False)

    one = {
        "held_s": [0, 1, 2],
        "replicas": {"a": [1, 2, 2], "b": [1, 1, 1]},
        "window_s": [0, 1],
        "token_steps_per_s": [3, 4],
        "p95_ms": [10, 20],
    }
    cases: list[object] = [[], {}, {"series": {"per_group": 3}}]
    for wrong in cases:
        refused = picture(wrong)
        assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1, refused.stderr
    made = picture({"device": "emulated", "series": {"per_group": one, "uniform": one}})
    assert made.returncode == 0, made.stderr
    assert "All groups scale together" in (tmp_path / "images" / "made.svg").read_text()
