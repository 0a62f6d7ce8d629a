"""`expertmesh top`: a live view of groups, hot experts and uneven layers."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from expertmesh.cluster import record
from expertmesh.cluster.hottest import Top, top_of
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.cluster.status import GroupStatus, join
from expertmesh.commands.console import out
from expertmesh.commands.status import load_cells, scaling_lines
from expertmesh.directory.client import expert_load, list_table, scaling
from expertmesh.errors import ClusterError

LAYERS_SHOWN = 10


def top(
    name: Annotated[str | None, typer.Argument(help="Cluster's name; default: the only one.")] = None,
    window: Annotated[float, typer.Option(min=3, max=600, help="Seconds over which experts' rows are counted.")] = 60,
    experts: Annotated[int, typer.Option(min=1, max=1000, help="Show so many of the hottest experts.")] = 10,
    every: Annotated[float, typer.Option(min=0.5, max=3600, help="Look again after so many seconds.")] = 2,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs: look once, print one JSON object.")] = False,
) -> None:
    """Watch groups, hot experts and uneven layers. Ctrl-C ends it.

    Example: expertmesh top --once --window 10
    """
    cluster = record.require(name)
    found = look(cluster, window, experts)
    if json:
        typer.echo(found.model_dump_json(indent=2))
        return
    if once:
        out.print(view(found))
        return
    with Live(view(found), console=out, screen=out.is_terminal, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            try:
                live.update(view(look(cluster, window, experts)), refresh=True)
            except ClusterError as error:
                live.update(Text(str(error)), refresh=True)


def look(cluster: record.Record, window_s: float, experts: int) -> Top:
    """Raises ClusterError where the cluster does not answer."""
    details = ServeApi(cluster.dashboard, cluster.token).details()
    status = join(
        cluster, details, list_table(cluster.directory, tls=cluster.tls), scaling(cluster.directory, tls=cluster.tls)
    )
    return top_of(status, expert_load(cluster.directory, window_s, tls=cluster.tls), experts)


def view(found: Top) -> RenderableType:
    head = f"cluster {found.cluster.name}, model {found.cluster.model}; experts over the last {found.window_s:.0f} s"
    tables = Table.grid(padding=(0, 3))
    tables.add_row(experts_table(found), layers_table(found))
    lines = [Text(line) for line in (head, *scaling_lines(found.cluster, time.time()))]
    return Group(lines[0], groups_table(found), tables, *lines[1:])


def groups_table(found: Top) -> Table:
    table = Table("group", title="groups", title_justify="left")
    for column in ("ready", "wanted", "rows", "rows/s", "busy", "queued", "wait p95"):
        table.add_column(column, justify="right")
    for group in found.cluster.groups:
        table.add_row(group.name, str(group.ready), _wanted(group), *load_cells(group))
    return table


def experts_table(found: Top) -> Table:
    table = Table(title="hottest experts", title_justify="left")
    for column in ("layer", "expert", "rows/s", "of layer"):
        table.add_column(column, justify="right")
    for one in found.experts:
        table.add_row(str(one.layer), str(one.expert), f"{one.rows_per_s:,.1f}", f"{one.share:.1%}")
    return table


def layers_table(found: Top) -> Table:
    """The least even ones; `balanced` is mean over largest load of a replica."""
    table = Table(title="least even layers", title_justify="left")
    for column in ("layer", "rows/s", "balanced"):
        table.add_column(column, justify="right")
    for one in found.layers[:LAYERS_SHOWN]:
        balanced = "-" if one.balancedness is None else f"{one.balancedness:.2f}"
        table.add_row(str(one.layer), f"{one.rows_per_s:,.1f}", balanced)
    return table


def _wanted(group: GroupStatus) -> str:
    if group.scaling is None:
        return str(group.serve.target)
    return f"{group.scaling.last.target} ({group.scaling.min_replicas}-{group.scaling.max_replicas})"
