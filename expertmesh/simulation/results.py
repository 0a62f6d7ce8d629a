"""What a simulation found, as plain values: one figure per strategy, and what scaling groups alone saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
from rich.table import Table

from expertmesh.simulation.course import Course
from expertmesh.simulation.lane import IN_TIME_SHARE, WAITS_S, Totals
from expertmesh.simulation.run import Simulated

ROWS = (
    ("replica_seconds", "replica-seconds", "{:,.0f}"),
    ("gpu_hours", "GPU-hours of replicas", "{:,.0f}"),
    ("node_gpu_hours", "GPU-hours of nodes", "{:,.0f}"),
    ("peak_replicas", "most replicas", "{:,d}"),
    ("rows_in_time", "rows in time", "{:.3%}"),
    ("ticks_in_time", "ticks in time", "{:.2%}"),
    ("p95_wait_ms", "queue wait p95, ms", "{:.3f}"),
    ("p99_wait_ms", "queue wait p99, ms", "{:.3f}"),
    ("scale_ups", "times scaled up", "{:,d}"),
    ("scale_downs", "times scaled down", "{:,d}"),
    ("nodes_started", "nodes started", "{:,d}"),
)
"""Of the table: figure, title and form."""
Figures = dict[str, Any]


def summarize(found: Simulated) -> Figures:
    """Times are seconds of the simulated cluster unless the name says otherwise."""
    scenario = found.scenario
    strategies = {one.name: figures(one, scenario.ticks) for one in found.courses}
    return {
        "name": scenario.name,
        "seed": scenario.seed,
        "duration_s": scenario.ticks * scenario.policy.tick_s,
        "tick_s": scenario.policy.tick_s,
        "groups": len(found.layout.groups),
        "tokens": found.tokens,
        "peak_tokens_per_s": found.peak_tokens_per_s,
        "objective_layer_ms": scenario.objective.layer_ms,
        "strategies": strategies,
        "saved_by_groups": {
            name: saved(strategies["groups"], other)
            for name, other in strategies.items()
            if name != "groups" and "groups" in strategies
        },
    }


def figures(one: Course, ticks: int) -> Figures:
    """`rows_in_time`: share of rows whose wait and service met the objective; `ticks_in_time`: of ticks in which 99 %
    did; `gpu_hours`: of GPUs that replicas held; `node_gpu_hours`: of all GPUs of the nodes that were there."""
    totals, used = one.totals, one.used
    rows = max(totals.rows_in, 1e-12)
    return {
        "replica_seconds": used.replica_s,
        "gpu_hours": used.gpu_s / 3600,
        "node_gpu_hours": used.node_gpu_s / 3600,
        "peak_replicas": used.peak_replicas,
        "peak_gpus": used.peak_gpus,
        "rows_in_time": totals.rows_in_time / rows,
        "ticks_in_time": totals.ticks_in_time / ticks,
        "mean_wait_ms": 1e3 * totals.wait_row_s / rows,
        "p50_wait_ms": 1e3 * quantile_s(totals, 0.5),
        "p95_wait_ms": 1e3 * quantile_s(totals, 0.95),
        "p99_wait_ms": 1e3 * quantile_s(totals, 0.99),
        "scale_ups": used.ups,
        "scale_downs": used.downs,
        "nodes_started": used.nodes_started,
        "rows_in": totals.rows_in,
        "rows_served": totals.rows_served,
        "rows_waiting": totals.rows_waiting,
    }


def quantile_s(totals: Totals, share: float) -> float:
    """The wait that this share of the rows does not exceed; 0 where it is below 10 µs, the least that is told apart."""
    later = totals.later / max(totals.rows_in_histogram, 1e-12)
    if later[0] <= 1 - share:
        return 0.0
    # ascending in -later; waits between two limits are spread evenly over the logarithm
    return float(numpy.exp(numpy.interp(share - 1, -later, numpy.log(WAITS_S))))


def saved(ours: Mapping[str, Any], other: Mapping[str, Any]) -> Figures:
    """Shares of the other's."""
    return {
        name: 1 - ours[name] / other[name] if other[name] else 0.0
        for name in ("replica_seconds", "gpu_hours", "node_gpu_hours")
    }


def savings_table(summary: Figures) -> Table:
    """One column per strategy."""
    table = Table("", *summary["strategies"], box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for key, title, form in ROWS:
        table.add_row(title, *(form.format(found[key]) for found in summary["strategies"].values()))
    gains = [summary["saved_by_groups"].get(name) for name in summary["strategies"]]
    for key, title in (("replica_seconds", "replica-s"), ("node_gpu_hours", "node GPU-h")):
        table.add_row(f"groups save {title}", *("" if gain is None else f"{gain[key]:.1%}" for gain in gains))
    return table


def caption(summary: Figures) -> str:
    return (
        f"{summary['groups']:,} groups, {summary['duration_s'] / 3600:g} h, {summary['tokens']:.3g} tokens, "
        f"at most {summary['peak_tokens_per_s']:,.0f}/s; in time: wait and service of a layer within "
        f"{summary['objective_layer_ms']:g} ms (a tick: for {IN_TIME_SHARE:.0%} of its rows); simulated"
    )
