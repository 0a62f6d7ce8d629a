"""A regression is told, chance is not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import made_config, made_run
from rich.console import Console

from expertmesh.errors import ConfigError
from loadtest.compare import compare_figure, compare_runs, print_comparison
from loadtest.report import summarize


def written(directory: Path, repeats: int = 3, changes: dict[str, Any] | None = None, **run: Any) -> Path:
    directory.mkdir()
    found = summarize(made_run(repeats, **run), made_config(repeats=repeats)) | (changes or {})
    (directory / "summary.json").write_text(json.dumps(found))
    return directory


def test_the_same_run_has_not_changed(tmp_path: Path) -> None:
    found = compare_runs(written(tmp_path / "a"), written(tmp_path / "b"))
    assert not found.regressed
    assert all(row.worse == 0 for row in found.rows)
    assert {"ttft_ms.p99", "goodput", "error_share"} <= {row.figure for row in found.rows}


def test_another_sample_of_the_same_is_no_regression(tmp_path: Path) -> None:
    found = compare_runs(
        written(tmp_path / "a"), written(tmp_path / "b", seed=1), {"request_rate": 15, "output_rate": 30}
    )
    assert not found.regressed, [row for row in found.rows if row.regressed]


def test_slower_answers_are_a_regression(tmp_path: Path) -> None:
    found = compare_runs(written(tmp_path / "a"), written(tmp_path / "b", slower=1.4))
    regressed = {row.figure for row in found.rows if row.regressed}
    assert {"ttft_ms.p50", "itl_ms.p50", "tpot_ms.p50"} <= regressed
    row = next(row for row in found.rows if row.figure == "itl_ms.p50")
    assert row.worse == pytest.approx(40, abs=5) and row.low is not None and row.high is not None
    assert row.low <= row.worse <= row.high
    back = compare_runs(tmp_path / "b", tmp_path / "a")
    assert not {row.figure for row in back.rows if row.regressed} & regressed


def test_a_threshold_can_be_raised(tmp_path: Path) -> None:
    before, after = written(tmp_path / "a"), written(tmp_path / "b", slower=1.4)
    row = next(one for one in compare_runs(before, after, {"itl_ms.p50": 60}).rows if one.figure == "itl_ms.p50")
    assert not row.regressed
    extra = compare_runs(before, after, {"e2e_ms.p99.9": 1})
    assert "e2e_ms.p99.9" in {row.figure for row in extra.rows}


def test_what_may_be_chance_is_no_regression() -> None:
    assert not compare_figure("ttft_ms.p50", [10.0, 20.0], [12.0, 26.0], 10).regressed
    assert compare_figure("ttft_ms.p50", [10.0, 10.2], [13.0, 13.2], 10).regressed
    assert compare_figure("ttft_ms.p50", [10.0], [13.0], 10).regressed  # no repeats: the threshold alone decides


def test_twins_are_compared_one_by_one(tmp_path: Path) -> None:
    """Repeats that differ much, all a little slower: certain only if each is compared with its twin."""
    before, after = [10.0, 20.0, 30.0], [12.4, 22.6, 32.5]
    assert not compare_figure("ttft_ms.p50", before, after, 10).regressed
    assert compare_figure("ttft_ms.p50", before, after, 10, paired=True).certain
    assert compare_figure("ttft_ms.p50", before, before, 10, paired=True).worse == 0
    config = made_config(seed=1).model_dump(mode="json")
    same = compare_runs(written(tmp_path / "a"), written(tmp_path / "b", slower=1.1))
    other = compare_runs(tmp_path / "a", written(tmp_path / "c", slower=1.1, changes={"config": config}))
    widths = [next(row.high - row.low for row in one.rows if row.figure == "e2e_ms.p50") for one in (same, other)]
    assert widths[0] < widths[1]


def test_less_is_worse_for_rates_and_more_for_errors() -> None:
    assert compare_figure("goodput", [10.0, 10.1], [8.0, 8.1], 5).regressed
    assert not compare_figure("goodput", [8.0, 8.1], [10.0, 10.1], 5).regressed
    errors = compare_figure("error_share", [0.0, 0.0], [0.01, 0.01], 0.1)
    assert errors.regressed and errors.worse == pytest.approx(1.0)


def test_percents_of_next_to_nothing_are_not_taken() -> None:
    assert not compare_figure("itl_ms.p50", [0.0, 0.0], [0.05, 0.05], 10).regressed
    assert compare_figure("itl_ms.p50", [0.0, 0.0], [5.0, 5.0], 10).regressed


def test_other_configs_are_remarked(tmp_path: Path) -> None:
    config = made_config().model_dump(mode="json")
    config["stages"][1]["arrivals"]["rate"] = 12
    found = compare_runs(written(tmp_path / "a"), written(tmp_path / "b", changes={"config": config}))
    assert found.remarks == ("the runs differ in more than their target: stages.1.arrivals.rate: 10.0, 12",)
    alone = compare_runs(written(tmp_path / "c", 1), written(tmp_path / "d", 1))
    assert any("no confidence" in remark for remark in alone.remarks)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"valid": False}, "b/summary.json: the run is invalid"),
        ({"interrupted": True}, "b/summary.json: the run was interrupted"),
        ({"format": 99}, "format 99, this one reads 1"),
        ({"target": "experts"}, "targets of different kinds: openai, experts"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    before, after = written(tmp_path / "a"), written(tmp_path / "b", changes=changes)
    with pytest.raises(ConfigError, match=said):
        compare_runs(before, after)


def test_directories_without_a_summary(tmp_path: Path) -> None:
    before = written(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"summary\.json: no such file"):
        compare_runs(before, tmp_path / "nothing")
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(ConfigError, match="not the summary of a load test"):
        compare_runs(before, tmp_path)
    with pytest.raises(ConfigError, match=r"threshold: no figure 'ttft' in both runs \(figures: .*ttft_ms\.p50"):
        compare_runs(before, before, {"ttft": 1})


def test_it_prints_the_verdict(tmp_path: Path) -> None:
    text = io.StringIO()
    found = compare_runs(written(tmp_path / "a"), written(tmp_path / "b", slower=1.4))
    print_comparison(found, Console(file=text, width=140))
    verdict = text.getvalue().splitlines()[-1]
    assert verdict.startswith("regressed: ") and "ttft_ms.p50" in verdict
    assert json.loads(json.dumps(found.as_json()))["figures"]["itl_ms.p50"]["regressed"]
