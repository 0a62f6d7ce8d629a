"""How benchmarks compare and report, without running one."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch

from benchmarks import report, wire
from benchmarks.environment import environment
from benchmarks.measure import alternate, median_percentile, median_ratio, percentile, slope
from router_service.dispatch.scatter import to_pairs


def test_runs_take_turns_and_warm_up_does_not_count() -> None:
    order: list[str] = []
    calls = iter(range(100))

    def run(name: str) -> int:
        order.append(name)
        return next(calls)

    found = alternate({"a": lambda: run("a"), "b": lambda: run("b")}, rounds=2, warm_up=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [3, 4], "b": [2, 5]}


@pytest.mark.parametrize(("share", "figure"), [(0.0, 1), (0.5, 50), (0.99, 99), (1.0, 100)])
def test_a_percentile_is_the_smallest_that_enough_do_not_exceed(share: float, figure: float) -> None:
    assert percentile(range(100, 0, -1), share) == figure


def test_ratios_are_taken_within_a_round() -> None:
    assert median_ratio([2, 40, 6], [1, 10, 2]) == 3
    assert median_percentile([[1, 2, 3], [10, 20, 30], [4, 5, 6]], 0.5) == 5


def test_a_slope_is_that_of_the_line() -> None:
    assert slope({1.0: 53.0, 2.0: 56.0, 4.0: 62.0}) == pytest.approx(3)


def test_every_expert_gets_as_many_rows_as_the_next() -> None:
    _, ids, weights = wire.routed(64)
    assert set(to_pairs(ids, weights).counts().values()) == {8}
    assert bool((ids[:, 0] != ids[:, 1]).all())
    assert not torch.equal(*wire.routed(16)[1].T)


def test_the_experts_of_each_layer_are_divided_among_its_replicas(tmp_path: Path) -> None:
    manifest = wire.make_artifact(tmp_path)
    for count in wire.COUNTS:
        layer = wire.layer_of(count)
        held = [
            wire.experts_of(number)[layer] for number in range(max(wire.COUNTS)) if layer in wire.experts_of(number)
        ]
        assert len(held) == len(set(held)) == count
    assert set(manifest.layers) == set(wire.experts_of(0))


def test_the_page_says_what_was_measured_and_on_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    figures = {"ratio": {"1x1": 2.0, "16x4": 3.25}, "split": {"1": {"pack": 7.5}}, "rows": 16, "environment": {}}
    page = report.write({"dispatch": figures}, environment(), datetime.date(2026, 1, 2))
    text = page.read_text()
    assert page.name == "2026-01-02.md"
    assert "| dispatch | ratio | 1x1: 2 · 16x4: 3.25 |" in text
    assert "| dispatch | split, 1 | pack: 7.5 |" in text
    assert "| dispatch | rows | 16 |" in text and "python -m benchmarks dispatch" in text and "cores" in text
