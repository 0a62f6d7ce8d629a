"""Two runs side by side: what changed, how sure that is, and whether it is a regression."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from expertmesh.errors import ConfigError
from loadtest.confidence import difference
from loadtest.summary import FORMAT, SUMMARY_FILE
from loadtest.tables import number

THRESHOLDS: dict[str, float] = {
    "request_rate": 5.0,
    "output_rate": 5.0,
    "goodput": 5.0,
    "good_share": 1.0,
    "error_share": 0.1,
    **{
        f"{name}_ms.{percentile}": percent
        for name in ("ttft", "tpot", "itl", "e2e")
        for percentile, percent in (("p50", 10.0), ("p90", 15.0), ("p99", 20.0))
    },
}
"""Figure -> how much worse it may get: percent; of shares percentage points."""
HIGHER_IS_BETTER = frozenset({"request_rate", "output_rate", "goodput", "good_share"})
LEAST_MS, LEAST_RATE = 1.0, 0.001
"""Figures below it are taken as it, since percents of next to nothing mean nothing."""
TRAFFIC = ("seed", "stages", "workload", "expert_load")
"""Parts of a config that decide what is sent: where they are alike, the n-th repeats of two runs are twins."""
UNRELATED = ("name", "repeats", "pause_s", "sampling", "client", "target")
"""Parts of a config in which runs may differ and still be compared without a remark."""


@dataclass(frozen=True)
class Row:
    """One figure. `worse` and `low` to `high` count in percent of `before`, of shares in percentage points; more is
    worse."""

    figure: str
    before: float
    after: float
    worse: float
    low: float | None
    high: float | None
    threshold: float
    certain: bool | None
    """Whether the confidence interval excludes no change; None where there is none."""

    @property
    def regressed(self) -> bool:
        """Beyond the threshold, and not by chance as far as can be told."""
        return self.worse > self.threshold and self.certain is not False


@dataclass(frozen=True)
class Comparison:
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        return any(row.regressed for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        figures = {row.figure: vars(row) | {"regressed": row.regressed} for row in self.rows}
        return {"regressed": self.regressed, "figures": figures, "remarks": list(self.remarks)}


def compare_runs(before: Path, after: Path, thresholds: Mapping[str, float] | None = None) -> Comparison:
    """`before`, `after`: result directories; `thresholds` are used on top of THRESHOLDS and in their place.

    Raises ConfigError with one line for a directory without a summary, an invalid or interrupted run, runs of different
    kinds of target, and a threshold for a figure that neither run has.
    """
    first, second = read_summary(before), read_summary(after)
    if first["target"] != second["target"]:
        raise ConfigError(f"{before} and {after}: targets of different kinds: {first['target']}, {second['target']}")
    limits = {**THRESHOLDS, **(thresholds or {})}
    shared = [name for name in limits if name in first["figures"] and name in second["figures"]]
    for name in thresholds or {}:
        if name not in shared:
            known = ", ".join(name for name in first["figures"] if name in second["figures"])
            raise ConfigError(f"threshold: no figure {name!r} in both runs (figures: {known})")
    alike = all(first["config"].get(part) == second["config"].get(part) for part in TRAFFIC)
    rows = []
    for name in shared:
        values = first["figures"][name]["per_repeat"], second["figures"][name]["per_repeat"]
        paired = alike and first["repeats"] == second["repeats"] == len(values[0]) == len(values[1])
        rows.append(compare_figure(name, *values, limits[name], paired=paired))
    return Comparison(tuple(rows), tuple(_remarks(first, second)))


def compare_figure(
    figure: str, before: list[float], after: list[float], threshold: float, *, paired: bool = False
) -> Row:
    """`before`, `after`: its values per repeat; `paired`: of the same traffic, repeat by repeat."""
    found = difference(before, after, paired=paired)
    mean_before, mean_after = sum(before) / len(before), sum(after) / len(after)
    sign = -1.0 if figure in HIGHER_IS_BETTER else 1.0
    scale = 100.0 * sign / (1.0 if figure.endswith("_share") else max(mean_before, _least(figure)))
    bounds = (None, None) if found.low is None or found.high is None else (found.low * scale, found.high * scale)
    low, high = bounds if sign > 0 else bounds[::-1]
    return Row(figure, mean_before, mean_after, found.value * scale + 0.0, low, high, threshold, found.certain)


def _least(figure: str) -> float:
    return LEAST_MS if "_ms." in figure else LEAST_RATE


def read_summary(directory: Path) -> dict[str, Any]:
    """Raises ConfigError where there is none, or it is of an invalid or an interrupted run."""
    path = directory if directory.suffix == ".json" else directory / SUMMARY_FILE
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        kind, valid, interrupted = found["format"], found["valid"], found["interrupted"]
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: not the summary of a load test") from None
    if kind != FORMAT:
        raise ConfigError(f"{path}: of another version of expertmesh: format {kind}, this one reads {FORMAT}")
    if not valid:
        raise ConfigError(f"{path}: the run is invalid, since its client did not keep its schedule")
    if interrupted:
        raise ConfigError(f"{path}: the run was interrupted")
    return found


def print_comparison(comparison: Comparison, console: Console) -> None:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("figure", "before", "after", "worse by", "95 % interval", "allowed", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right", no_wrap=True)
    for row in comparison.rows:
        unit = " pt" if row.figure.endswith("_share") else " %"
        interval = (
            "-" if row.low is None or row.high is None else f"{row.low + 0.0:+.1f} to {row.high + 0.0:+.1f}{unit}"
        )
        mark = "[red]regressed[/]" if row.regressed else "by chance?" if row.worse > row.threshold else ""
        cells = (number(row.before), number(row.after), f"{row.worse:+.1f}{unit}", interval, f"{row.threshold:g}{unit}")
        table.add_row(row.figure, *cells, mark)
    console.print(table)
    for remark in comparison.remarks:
        console.print(remark, highlight=False, soft_wrap=True)
    regressed = [row.figure for row in comparison.rows if row.regressed]
    verdict = f"regressed: {', '.join(regressed)}" if regressed else "no regression"
    console.print(verdict, style="bold red" if regressed else "bold green", highlight=False, soft_wrap=True)


def _remarks(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    remarks = []
    if min(first["repeats"], second["repeats"]) < 2:
        remarks.append("no confidence: it needs two repeats and more on both sides (repeats: 3)")
    changed = _differences(first["config"], second["config"], "")
    if changed:
        remarks.append(f"the runs differ in more than their target: {'; '.join(changed)}")
    return remarks


def _differences(first: Any, second: Any, path: str) -> list[str]:
    """`stages.0.arrivals.rate: 5, 6` for each value that differs."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [key for key in {**first, **second} if path or key not in UNRELATED]
        return [
            text
            for key in keys
            for text in _differences(first.get(key), second.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [text for place, (one, other) in pairs for text in _differences(one, other, f"{path}.{place}")]
    return [] if first == second else [f"{path}: {json.dumps(first)}, {json.dumps(second)}"]
