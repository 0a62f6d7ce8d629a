"""`expertmesh simulate`: files, JSON, schema, and one line for bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from simulation.scenarios import SMALL
from typer.testing import CliRunner

from expertmesh.cli import app, main
from expertmesh.simulation.scenario import read_scenario

EXAMPLES = Path(__file__).parents[2] / "examples" / "simulate"


def written(folder: Path, **changes: Any) -> Path:
    file = folder / "scenario.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "duration_s": 200, **changes}))
    return file


def test_results_are_files_and_json(tmp_path: Path) -> None:
    out = tmp_path / "results"
    done = CliRunner().invoke(app, ["simulate", str(written(tmp_path)), "--json", "-o", str(out), "--report"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert set(summary["strategies"]) == {"groups", "uniform", "static_peak", "static_mean"}
    assert (out / "day.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "report.html").read_text()
    assert len((out / "series.csv").read_text().splitlines()) == 1 + 4 * 20
    assert read_scenario(out / "scenario.yaml") == read_scenario(written(tmp_path))


def test_the_table_says_what_is_saved(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["simulate", str(written(tmp_path))])
    assert done.exit_code == 0, done.output
    assert "groups save" in done.stdout and "simulated" in done.stdout


def test_help_has_an_example_and_the_schema_is_one() -> None:
    assert "Example: expertmesh simulate" in CliRunner().invoke(app, ["simulate", "--help"]).output
    schema = json.loads(CliRunner().invoke(app, ["simulate", "--schema"]).stdout)
    assert {"model", "device", "traffic"} <= set(schema["required"])


@pytest.mark.parametrize("example", ["small.yaml", "day-10000.yaml"])
def test_examples_are_valid(example: str) -> None:
    assert read_scenario(EXAMPLES / example).ticks > 1000


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"division": None}, "one of division, groups and plan is needed, given: none"),
        ({"plan": "absent.json"}, "given: division, plan"),
        ({"division": None, "plan": "absent.json"}, "absent.json"),
        ({"device": {"teraflops": 0, "memory_gb_per_s": 1}}, "device.teraflops"),
        ({"policy": {"tick_s": 0.1}}, "policy.tick_s"),
        ({"duration_s": 1e9}, "at most 200000"),
        ({"duration_s": 5}, "less than a tick"),
        ({"duration_s": float("inf")}, "duration_s"),
        ({"strategies": ["groups", "groups"]}, "stands twice"),
        ({"strategies": ["planned"]}, "planned needs the section planner"),
        ({"policy": {"metrics_age_s": 99}}, "policy.metrics_age_s: 99 s, but scaling.stale_after_s 10 ignores those"),
        (
            {
                "division": None,
                "groups": [
                    {"name": "a", "experts": "0-15"},
                    {"name": "b", "experts": "16-31", "scaling": {"stale_after_s": 4}},
                ],
                "policy": {"metrics_age_s": 5},
            },
            "policy.metrics_age_s: 5 s, but stale_after_s 4 of group b ignores those",
        ),
        ({"nodes": {"min_nodes": 9, "max_nodes": 3}}, "max_nodes 3 < min_nodes 9"),
        ({"division": None, "groups": [{"name": "a", "experts": "0-30"}]}, "layer 0: no group holds expert 31"),
        (
            {"division": None, "groups": [{"name": "a", "experts": "0-32"}]},
            "group a: experts: layer 0 has experts 0-31",
        ),
        ({"colour": 1}, "colour: unknown key"),
    ],
)
def test_bad_input_is_one_line(
    changes: dict[str, Any],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "scenario.yaml"
    described = {key: value for key, value in {**SMALL, "duration_s": 200, **changes}.items() if value is not None}
    file.write_text(yaml.safe_dump(described))
    said = run(["simulate", str(file), "-o", str(tmp_path / "out")], monkeypatch, capsys)
    assert told in said
    assert not (tmp_path / "out").exists(), "nothing half written"


def test_results_are_not_mixed_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(["simulate", str(written(tmp_path)), "-o", str(tmp_path)], monkeypatch, capsys)
    assert "is not empty" in said
    assert "-o DIR" in run(["simulate", str(written(tmp_path)), "--report"], monkeypatch, capsys)


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a failing command says."""
    monkeypatch.setattr(sys, "argv", ["expertmesh", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("expertmesh: ")
    return lines[0]
