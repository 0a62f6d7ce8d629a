"""What `expertmesh plan` prints: divisions side by side, and the groups of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.table import Table

from expertmesh.placement.comparison import Figures, PlannedGroup
from expertmesh.placement.make import Proposal

LINES: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("balancedness, mean of layers", lambda one: f"{one.balancedness:.3f}"),
    ("balancedness, worst layer", lambda one: f"{one.worst_layer_balancedness:.3f}"),
    ("replicas", lambda one: f"{one.replicas:,}"),
    ("busiest replica", lambda one: f"{one.busiest:.0%}"),
    ("memory of experts, GiB", lambda one: f"{one.memory_gib:,.4g}"),
    ("replica-seconds per hour", lambda one: f"{one.replica_seconds_per_hour:,.0f}"),
    ("memory x time, GiB-hours per day", lambda one: f"{one.memory_gib_hours_per_day:,.4g}"),
)


def comparison_table(made: Proposal) -> Table:
    """One column per division: today's groups, the plan's, and EPLB on as many replicas."""
    table = Table(caption="EPLB: on as many replicas as this plan, with as many slots", caption_justify="left")
    table.add_column("at these loads")
    shown = [
        (name, figures)
        for name, figures in (
            ("today", made.today),
            ("this plan", made.planned),
            ("EPLB (baseline)", made.eplb),
        )
        if figures is not None
    ]
    for name, _ in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for label, text in LINES:
        table.add_row(label, *(text(figures) for _, figures in shown))
    return table


def groups_table(title: str, groups: Iterable[PlannedGroup]) -> Table:
    """One row per group; experts are the mean over layers."""
    table = Table(title=title, title_justify="left")
    table.add_column("group", no_wrap=True)
    for column in ("experts/layer", "load", "replicas", "busy", "GiB each", "bounds"):
        table.add_column(column, justify="right")
    for one in groups:
        table.add_row(
            one.name,
            f"{one.experts_per_layer:.4g}",
            f"{one.load_share:.1%}",
            str(one.replicas),
            f"{one.busy:.0%}",
            f"{one.memory_gib:.3g}",
            f"{one.min_replicas}-{one.max_replicas}",
        )
    return table
