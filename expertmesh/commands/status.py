"""`expertmesh status`: groups, replicas, experts and rows, as the directory and Ray Serve have them."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.table import Table

from expertmesh.cluster import record
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.cluster.status import (
    ApplicationStatus,
    ClusterStatus,
    GroupStatus,
    ReplicaStatus,
    ScalingStatus,
    describe_experts,
    join,
)
from expertmesh.commands.console import out
from expertmesh.directory.client import list_table, scaling


def status(
    name: Annotated[str | None, typer.Argument(help="Cluster's name; default: the only one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """Show what runs.

    Example: expertmesh status --json
    """
    cluster = record.require(name)
    details = ServeApi(cluster.dashboard, cluster.token).details()
    found = join(
        cluster, details, list_table(cluster.directory, tls=cluster.tls), scaling(cluster.directory, tls=cluster.tls)
    )
    if json:
        typer.echo(found.model_dump_json(indent=2))
        return
    out.print(f"cluster {found.name}, model {found.model}", highlight=False)
    out.print(f"OpenAI API {found.api}, dashboard {found.dashboard}", highlight=False, soft_wrap=True)
    for application in (found.router, found.directory):
        out.print(_application(application), highlight=False)
    out.print(groups_table(found))
    for group in found.groups:
        if not group.agree:
            out.print(_disagreement(group), highlight=False, soft_wrap=True)
    for line in scaling_lines(found, time.time()):
        out.print(line, highlight=False, soft_wrap=True, markup=False)


def scaling_lines(found: ClusterStatus, now: float) -> list[str]:
    """Of each group that scales: what is wanted, and why; then those whose autoscaler is stalled."""
    scaled = [(group.name, group.scaling) for group in found.groups if group.scaling is not None]
    lines = [f"group {name}: {_decided(one, now)}" for name, one in scaled]
    return lines + [f"! group {name}: {_stalled(one)}" for name, one in scaled if one.stalled]


def _decided(one: ScalingStatus, now: float) -> str:
    """E.g. 4 replicas wanted (1-8); 2 s ago: busy 71% of 60%."""
    ago_s = max(0.0, now - one.last.decided_at)
    why = f"no decision: {one.last.error}" if one.last.error else one.last.reason
    return f"{one.last.target} replicas wanted ({one.min_replicas}-{one.max_replicas}); {ago_s:.0f} s ago: {why}"


def _stalled(one: ScalingStatus) -> str:
    since = "ever" if one.since_success_s is None else f"for {one.since_success_s:.0f} s"
    return f"the autoscaler is stalled, no decision has succeeded {since}"


def groups_table(found: ClusterStatus) -> Table:
    """One row per replica below one per group."""
    table = Table()
    table.add_column("group")
    table.add_column("experts, addresses", no_wrap=True)
    table.add_column("ready", justify="right")
    table.add_column("state")
    for column in ("rows", "rows/s", "busy", "queued", "wait p95"):
        table.add_column(column, justify="right")
    for group in found.groups:
        replicas = f"{group.ready}/{group.serve.target}" + ("" if group.agree else " !")
        experts = describe_experts(group.experts)
        table.add_row(f"[bold]{group.name}[/]", experts, replicas, group.serve.status, *load_cells(group))
        for one in group.replicas:
            table.add_row("", f"[dim]{one.address}[/]", "", f"[dim]{one.state}[/]", *load_cells(one))
    return table


def load_cells(one: GroupStatus | ReplicaStatus) -> tuple[str, ...]:
    """Rows, rows/s, busy, queued, 95th percentile of the queue wait."""
    wait = f"{one.queue_wait_p95_ms:,.1f} ms"
    return f"{one.rows_total:,}", f"{one.rows_per_s:,.0f}", f"{one.busy:.0%}", f"{one.queued_rows:,}", wait


def _application(one: ApplicationStatus) -> str:
    return f"{one.application}: {one.status}, {one.running} of {one.target} replicas"


def _disagreement(group: GroupStatus) -> str:
    return (
        f"! group {group.name}: Ray Serve runs {group.serve.running} replicas, the directory holds "
        f"{len(group.replicas)}, {group.ready} of them ready"
    )
