"""`expertmesh up`: a running cluster from a config file, with what it waits for on screen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from expertmesh.cluster import launch, processes
from expertmesh.cluster.exposure import exposures
from expertmesh.cluster.readiness import Step
from expertmesh.cluster.record import Record
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.commands.console import err, out
from expertmesh.errors import ClusterError
from expertmesh.resources import out_of_reach


def up(
    config: Annotated[Path, typer.Argument(help="Cluster config, a YAML file.")],
    address: Annotated[
        str | None, typer.Option(help="URL of the dashboard of a Ray cluster to attach to; default: start one here.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stay in the foreground; Ctrl-C stops the cluster.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds until all must be ready.", min=1)] = 900,
) -> None:
    """Start a cluster, or apply a changed config to the one that runs.

    Example: expertmesh up examples/demo.yaml
    """
    plan = launch.read_plan(config)
    running = bring_up(plan, address, timeout)
    print_addresses(running)
    unreachable = out_of_reach(plan.config, ServeApi(running.dashboard, running.token).nodes())
    for line in unreachable + exposures(plan.config, running.dashboard, running.token):
        err.print(f"warning: {line}", highlight=False, soft_wrap=True, markup=False)
    if wait:
        try:
            stay_up(running)
        finally:
            err.print("stopping")
            launch.stop(running)


def bring_up(plan: launch.Plan, address: str | None, timeout_s: float) -> Record:
    """Starts, attaches to or changes the cluster, with progress on stderr."""
    known = launch.known_cluster(plan)
    if known is not None and address in (None, known.dashboard):
        err.print(f"cluster {known.name} is already running; applying {plan.path} to it", highlight=False)
        if line := launch.way_back(plan, known):
            err.print(f"this {line}", highlight=False, soft_wrap=True)
        with progress() as show:
            return launch.change(plan, known, timeout_s, show)
    if known is not None:
        raise ClusterError(
            f"cluster {known.name!r} already runs at {known.dashboard}; `expertmesh down {known.name}` first"
        )
    with progress() as show:
        if address is not None:
            return launch.attach(plan, address, timeout_s, show)
        return launch.start_local(plan, timeout_s, show)


def print_addresses(running: Record) -> None:
    out.print(f"OpenAI API  {running.http}/v1  (model {running.model})", highlight=False, soft_wrap=True)
    out.print(f"dashboard   {running.dashboard}", highlight=False, soft_wrap=True)
    secured = ", mutual TLS" if running.tls else ""
    out.print(f"directory   {running.directory} (gRPC{secured})", highlight=False, soft_wrap=True)


def stay_up(running: Record) -> None:
    """Returns after Ctrl-C or SIGTERM; raises ClusterError where the cluster ends by itself."""
    err.print("running; Ctrl-C stops it")
    try:
        while running.marker is None or processes.running(running.marker):
            time.sleep(2)
    except KeyboardInterrupt:
        return
    raise ClusterError(f"cluster {running.name} has ended by itself")


@contextmanager
def progress() -> Iterator[launch.Show]:
    """What `launch` is to call: a live table on a terminal, otherwise a line for each change."""
    began = time.monotonic()
    if err.is_terminal:
        with Live(console=err, refresh_per_second=4, transient=False) as live:
            yield lambda reached: live.update(render(reached, time.monotonic() - began))
        return
    said: dict[str, str] = {}

    def say(reached: Sequence[Step]) -> None:
        for name, line in (
            [("ray", "Ray: starting")] if not reached else [(one.application, _line(one)) for one in reached]
        ):
            if said.get(name) != line:
                said[name] = line
                err.print(f"{time.monotonic() - began:5.0f} s  {line}", highlight=False, soft_wrap=True)

    yield say


def render(reached: Sequence[Step], elapsed_s: float) -> Table:
    title = "starting Ray" if not reached else "waiting for"
    if reached and all(step.done for step in reached):
        title = "ready after"
    table = Table(
        title=f"{title} {elapsed_s:.0f} s" if reached else f"{title}, {elapsed_s:.0f} s", title_justify="left"
    )
    for column in ("", "application", "status", "detail"):
        table.add_column(column, overflow="fold")
    for step in reached:
        mark = "[red]✗[/]" if step.error else "[green]✓[/]" if step.done else "…"
        table.add_row(mark, step.application, step.status, step.detail)
    return table


def _line(step: Step) -> str:
    return (
        f"{step.application}: {step.status}{', ' + step.detail if step.detail else ''}{', ready' if step.done else ''}"
    )
