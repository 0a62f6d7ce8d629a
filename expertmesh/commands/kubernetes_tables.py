"""How `expertmesh kubernetes` shows things."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertmesh.commands.console import err, out
from expertmesh.errors import ConfigError
from expertmesh.kubernetes.report import Report
from expertmesh.kubernetes.serve_text import WHAT, diff
from expertmesh.kubernetes.transition import Proposal
from expertmesh.kubernetes.waiting import Show
from expertmesh.placement.plan import Plan, plan_text


def print_report(report: Report, to: Console) -> None:
    cluster = report.active_cluster or "no Ray cluster yet"
    pending = f", upgrade to {report.pending_cluster}" if report.active_cluster and report.pending_cluster else ""
    to.print(f"RayService {report.namespace}/{report.name}: {cluster}{pending}", highlight=False, soft_wrap=True)
    to.print(f"{report.endpoints} pods take requests", highlight=False)
    if not report.current:
        seen = f"generation {report.observed_generation} of {report.generation}"
        to.print(f"! the operator has not seen the last change yet: {seen}", highlight=False, soft_wrap=True)
    for table in (_conditions(report), _applications(report), _groups(report), _pods(report)):
        if table.row_count:
            to.print(table)


def print_proposal(proposal: Proposal, *, with_diff: bool) -> None:
    change = proposal.change
    for what, names in (
        ("stay", change.kept),
        ("other bounds", change.resized),
        ("come", change.added),
        ("go", change.removed),
    ):
        if names:
            out.print(f"{what}: {', '.join(names)}", highlight=False, soft_wrap=True)
    for wanted, real in change.renamed.items():
        out.print(f"group {wanted} of the plan runs as {real}", highlight=False)
    if with_diff:
        transition = proposal.transition
        typer.echo(diff(transition.text_before, transition.wanted, WHAT), nl=False)


def lines(to: Console) -> Show:
    """Prints a line for each change of what is awaited, with the seconds since this was made."""
    began, said = time.monotonic(), ""

    def show(text: str) -> None:
        nonlocal said
        if text != said:
            said = text
            to.print(f"{time.monotonic() - began:5.0f} s  {text}", highlight=False, soft_wrap=True, markup=False)

    return show


def sure() -> None:
    """Asks; raises ConfigError where there is nobody to ask."""
    if not sys.stdin.isatty():
        raise ConfigError("not started: no terminal to ask at; say --yes, or --dry-run to see what would be done")
    typer.confirm("apply?", abort=True, err=True)


def save_plan(plan: Plan, path: Path) -> None:
    """Raises ConfigError where it cannot be written."""
    try:
        path.write_text(plan_text(plan))
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    err.print(f"the groups that run now: {path}", highlight=False, soft_wrap=True)


def _conditions(report: Report) -> Table:
    table = Table("condition", "status", "reason", "message")
    for one in report.conditions:
        _add(table, one.type, one.status, one.reason, one.message)
    return table


def _applications(report: Report) -> Table:
    table = Table("application", "status", "message")
    for one in report.applications:
        _add(table, one.name, one.status, one.message)
    return table


def _groups(report: Report) -> Table:
    table = Table("group", "replicas", "ready", "status", "deployment", "pool")
    for one in report.groups:
        bounds = f"{one.min_replicas} to {one.max_replicas}"
        ready = "" if one.ready is None else str(one.ready)
        _add(table, one.name, bounds, ready, one.status, one.detail, one.pool)
    return table


def _pods(report: Report) -> Table:
    table = Table("role", "pool", "pod", "phase", "ready", "restarts", "node")
    for one in report.pods:
        ready = "yes" if one.ready else "no"
        _add(table, one.role, one.pool, one.name, one.phase, ready, str(one.restarts), one.node)
    return table


def _add(table: Table, *cells: str) -> None:
    """Cells as they are: Ray's messages hold brackets."""
    table.add_row(*map(escape, cells))
