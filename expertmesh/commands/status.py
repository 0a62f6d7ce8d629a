"""`expertmesh status`: groups, replicas, experts and rows, as the directory and Ray Serve have them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from expertmesh.cluster import record
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.cluster.status import ApplicationStatus, ClusterStatus, GroupStatus, describe_experts, join
from expertmesh.commands.console import out
from expertmesh.directory.client import list_table


def status(
    name: Annotated[str | None, typer.Argument(help="Cluster's name; default: the only one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """Show what runs.

    Example: expertmesh status --json
    """
    cluster = record.require(name)
    found = join(cluster, ServeApi(cluster.dashboard, cluster.token).details(), list_table(cluster.directory))
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


def groups_table(found: ClusterStatus) -> Table:
    """One row per replica below one per group."""
    table = Table()
    table.add_column("group")
    table.add_column("experts, addresses", no_wrap=True)
    table.add_column("ready", justify="right")
    table.add_column("state")
    for column in ("rows", "rows/s", "busy", "queued"):
        table.add_column(column, justify="right")
    for group in found.groups:
        replicas = f"{group.ready}/{group.serve.target}" + ("" if group.agree else " !")
        load = (f"{group.rows_total:,}", f"{group.rows_per_s:,.0f}", f"{group.busy:.0%}", f"{group.queued_rows:,}")
        table.add_row(f"[bold]{group.name}[/]", describe_experts(group.experts), replicas, group.serve.status, *load)
        for one in group.replicas:
            load = (f"{one.rows_total:,}", f"{one.rows_per_s:,.0f}", f"{one.busy:.0%}", f"{one.queued_rows:,}")
            table.add_row("", f"[dim]{one.address}[/]", "", f"[dim]{one.state}[/]", *load)
    return table


def _application(one: ApplicationStatus) -> str:
    return f"{one.application}: {one.status}, {one.running} of {one.target} replicas"


def _disagreement(group: GroupStatus) -> str:
    return (
        f"! group {group.name}: Ray Serve runs {group.serve.running} replicas, the directory holds "
        f"{len(group.replicas)}, {group.ready} of them ready"
    )
