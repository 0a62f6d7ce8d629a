"""The tables of report.html: a summary's figures as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loadtest.charts import LONG_NAMES

PERCENTILES = ("p50", "p75", "p90", "p95", "p99", "p99.9")
MAX_LAYERS = 8
BUNDLED = 0.2
"""Median over mean gap below which tokens come several at a time."""
Summary = dict[str, Any]
"""What summary.json holds."""


@dataclass(frozen=True)
class Cell:
    value: str
    note: str = ""
    text: bool = False
    """Words rather than a number."""


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    head: list[str]
    rows: list[list[Cell]]
    remark: str = ""
    wide: bool = False
    """Above the charts, as wide as the page."""


@dataclass(frozen=True)
class Names:
    """What one unit of work is called: of an OpenAI endpoint, or of the expert tier."""

    requests: str = "requests"
    tokens: str = "tokens"
    latencies: tuple[str, ...] = field(default_factory=lambda: tuple(LONG_NAMES))

    @classmethod
    def of(cls, summary: Summary) -> Names:
        return cls() if summary["target"] == "openai" else cls("dispatches", "rows", ("e2e",))


def tables(summary: Summary, names: Names) -> list[Table]:
    """Those that have rows."""
    found = [
        latency_table(summary, names),
        error_table(summary),
        group_table(summary),
        fault_table(summary),
        stage_table(summary, names),
        domain_table(summary),
        expert_table(summary),
    ]
    return [table for table in found if table.rows]


def latency_table(summary: Summary, names: Names) -> Table:
    figures, columns = summary["figures"], ("mean", *PERCENTILES, "max")
    rows = []
    for name in names.latencies:
        if f"{name}_ms.mean" not in figures:
            continue
        cells = [figures[f"{name}_ms.{column}"] for column in columns]
        rows.append([Cell(LONG_NAMES[name]), *(Cell(number(one["value"]), plus_minus(one)) for one in cells)])
    remark = "Mean over the repeats." if summary["repeats"] > 1 else "One repeat, so no confidence intervals."
    if "itl_ms.p50" in figures and figures["itl_ms.p50"]["value"] < BUNDLED * figures["itl_ms.mean"]["value"]:
        remark += " Tokens come in bundles, so that most gaps are next to nothing: TPOT is their pace."
    return Table("latency", "Latency, ms", ["", *columns], rows, remark, wide=True)


def error_table(summary: Summary) -> Table:
    rows = [
        [Cell(one["status"].replace("_", " ")), Cell(str(one["count"])), Cell(one["message"], text=True)]
        for one in summary["errors"]
    ]
    return Table("errors", "Failures by class", ["class", "count", ""], rows, wide=True)


def group_table(summary: Summary) -> Table:
    """With the group that would give way first on top: the longest queue, then the busiest."""
    groups = sorted(
        summary["groups"].items(), key=lambda item: (-item[1]["queued_rows_max"], -item[1]["busy_mean"], item[0])
    )
    rows = [
        [
            Cell(name),
            Cell(f"{one['replicas_min']:.0f} to {one['replicas_max']:.0f}"),
            Cell(number(one["rows_per_s_mean"])),
            Cell(f"{one['busy_mean']:.0%}"),
            Cell(f"{one['busy_max']:.0%}"),
            Cell(number(one["queued_rows_max"])),
        ]
        for name, one in groups
    ]
    head = ["group", "replicas", "rows/s", "busy, mean", "busy, most", "rows waiting, most"]
    return Table("groups", "Expert groups, the most loaded first", head, rows)


def fault_table(summary: Summary) -> Table:
    rows = []
    for one in summary["faults"]:
        until = f" to {one['until_s']:.1f}" if one["until_s"] is not None else ""
        first, gap = one["slowest_first_token_ms"], one["longest_gap_ms"]
        rows.append(
            [
                Cell(fault_name(one), one["error"] and f"not done: {one['error']}"),
                Cell(f"{one['at_s']:.1f}{until}", f"repeat {one['repeat'] + 1}"),
                Cell(str(one["requests"])),
                Cell(str(one["failed"])),
                Cell("-" if first is None else number(first)),
                Cell("-" if gap is None else number(gap)),
            ]
        )
    head = ["fault", "at, s", "open then", "failed", "slowest TTFT, ms", "longest gap, ms"]
    return Table("faults", "Faults and what they cost", head, rows, "Requests open during a fault or up to 10 s after.")


def fault_name(fault: dict[str, Any]) -> str:
    """The kind and whom it hit, unless the kind says so."""
    kind = str(fault["kind"]).replace("_", " ")
    return kind if kind.endswith(f" {fault['target']}") else f"{kind} {fault['target']}"


def stage_table(summary: Summary, names: Names) -> Table:
    """Where there are several."""
    stages = summary["stages"] if len(summary["stages"]) > 1 else {}
    latency = names.latencies[0]
    columns = [
        "due_rate",
        "request_rate",
        "output_rate",
        f"{latency}_ms.p50",
        f"{latency}_ms.p99",
        "good_share",
        "error_share",
    ]
    rows = []
    for name, stage in stages.items():
        figures = stage["figures"]
        cells = [Cell(percent_or_number(column, figures.get(column))) for column in columns]
        times = f"{stage['start_s']:g} to {stage['end_s']:g} s" + ("" if stage["measured"] else ", not counted")
        rows.append([Cell(name, times), *cells])
    long = LONG_NAMES[latency]
    head = ["stage", "due/s", "answered/s", f"{names.tokens}/s", f"{long} p50, ms", f"{long} p99, ms", "good", "failed"]
    return Table("stages", "Stages", head, rows)


def domain_table(summary: Summary) -> Table:
    columns = ["ttft_ms.p50", "ttft_ms.p99", "itl_ms.p50", "e2e_ms.p50", "error_share"]
    rows = [
        [Cell(name), Cell(str(one["requests"])), *(Cell(percent_or_number(key, one.get(key))) for key in columns)]
        for name, one in summary["domains"].items()
    ]
    head = ["domain", "requests", "TTFT p50, ms", "TTFT p99, ms", "ITL p50, ms", "E2E p50, ms", "failed"]
    return Table("domains", "Domains", head, rows)


def expert_table(summary: Summary) -> Table:
    """The MAX_LAYERS least balanced."""
    layers = sorted((summary["experts"] or {}).items(), key=lambda item: (item[1]["balancedness"], int(item[0])))
    rows = [
        [
            Cell(layer),
            Cell(f"{one['rows']:,}"),
            Cell(f"{one['balancedness']:.2f}"),
            Cell(str(one["hottest"])),
            Cell(f"{one['hottest_share']:.1%}"),
        ]
        for layer, one in layers[:MAX_LAYERS]
    ]
    remark = "Balancedness is the mean over the largest of the experts' rows: 1 is even."
    head = ["layer", "rows", "balancedness", "hottest expert", "its share"]
    return Table("experts", "Skew per MoE layer, the most uneven first", head, rows, remark)


def number(value: float) -> str:
    """Three digits that count, thousands set apart: 0.0123, 4.57, 12.3, 1,235."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def plus_minus(figure: dict[str, Any], scale: float = 1.0) -> str:
    if figure["low"] is None:
        return ""
    return f"± {number(scale * (figure['high'] - figure['low']) / 2)}"


def percent_or_number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if name.endswith("_share") else number(value)
