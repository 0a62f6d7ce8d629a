"""`expertmesh rebalance`: from the groups that run to those of a plan, with no failed request."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from expertmesh.cluster import record
from expertmesh.cluster.record import Record
from expertmesh.commands.console import err, out
from expertmesh.errors import ClusterError, ConfigError, ExpertMeshError
from expertmesh.placement.plan import read_plan_file
from expertmesh.rebalance.decision import Limits
from expertmesh.rebalance.journal import JournalFile
from expertmesh.rebalance.local import LocalCluster, Proposal
from expertmesh.rebalance.outlook import Outlook
from expertmesh.rebalance.run import Outcome, Patience, Progress, Show
from expertmesh.rebalance.watch import Controller

RESUME = "--resume"


def rebalance(
    plan: Annotated[Path | None, typer.Argument(help="Plan, as `expertmesh plan` makes it.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Cluster's name; default: the only one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    in_steps: Annotated[
        bool, typer.Option("--in-steps", help="Group by group, even where old and new have room side by side.")
    ] = False,
    resume: Annotated[bool, typer.Option(RESUME, help="Go on with one that was interrupted.")] = False,
    abort: Annotated[bool, typer.Option("--abort", help="Go back from one that was interrupted.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Stay: plan again from the observed loads and apply what is worth it.")
    ] = False,
    observe: Annotated[bool, typer.Option("--observe", help="With --watch: only say what would be applied.")] = False,
    threshold: Annotated[
        float, typer.Option(help="With --watch: least share of memory x time that a plan saves.", min=0, max=1)
    ] = 0.1,
    cool_down: Annotated[float, typer.Option(help="With --watch: seconds between two rebalances.", min=0)] = 600,
    window: Annotated[float, typer.Option(help="With --watch: seconds of load that count.", min=1)] = 300,
    interval: Annotated[float, typer.Option(help="With --watch: seconds between two looks.", min=1)] = 60,
    timeout: Annotated[float, typer.Option(help="Seconds until a new group must be ready.", min=1)] = 600,
    json: Annotated[bool, typer.Option("--json", help="For programs: JSON objects, one per line.")] = False,
) -> None:
    """Bring a running cluster to a plan's groups: new ones up, verified and in use before old ones go.

    Example: expertmesh rebalance plan.json --dry-run
    """
    if sum((plan is not None, resume, abort, watch)) != 1:
        raise typer.BadParameter("give one of PLAN, --resume, --abort and --watch")
    if observe and not watch:
        raise typer.BadParameter("--observe goes with --watch")
    running, patience = record.require(cluster), Patience(start_s=timeout)
    if watch:
        _watch(running, patience, Limits(threshold, cool_down), window, interval, observe=observe, json_lines=json)
    elif plan is None:
        with _locked(running), _progress() as show:
            local = LocalCluster(running, show, patience)
            _told(local, local.resume() if resume else local.abort(), None, json_lines=json)
    elif dry_run:
        local = LocalCluster(running, patience=patience)
        local.check_idle()
        _show_outlook(local.propose(read_plan_file(plan), str(plan.absolute()), in_steps=in_steps), json_lines=json)
    else:
        with _locked(running), _progress() as show:
            _apply(LocalCluster(running, show, patience), plan, yes=yes, in_steps=in_steps, json_lines=json)


def _apply(local: LocalCluster, path: Path, *, yes: bool, in_steps: bool, json_lines: bool) -> None:
    local.check_idle()
    proposal = local.propose(read_plan_file(path), str(path.absolute()), in_steps=in_steps)
    if proposal.change.nothing:
        _told(local, None, proposal, json_lines=json_lines)
        return
    if not yes:
        _confirm(proposal)
    _told(local, local.apply(proposal), proposal, json_lines=json_lines)


def _confirm(proposal: Proposal) -> None:
    if not sys.stdin.isatty():
        raise ConfigError("not started: no terminal to ask at; say --yes, or --dry-run to see what would be done")
    err.print(_outlook_table(proposal.outlook))
    typer.confirm("apply?", abort=True, err=True)


def _told(local: LocalCluster, outcome: Outcome | None, proposal: Proposal | None, *, json_lines: bool) -> None:
    """Says how it ended; raises ClusterError where it went back without having been asked to."""
    last = local.journals.last()
    reason = last.reason if last and outcome == "rolled back" else ""
    if json_lines:
        seconds = round(last.ended_at - last.started_at, 1) if outcome and last and last.ended_at else 0.0
        found = {"outcome": outcome or "nothing to do", "reason": reason, "seconds": seconds}
        groups = {"kept", "resized", "added", "removed", "renamed"}
        typer.echo(json.dumps(found | (proposal.outlook.model_dump(mode="json", include=groups) if proposal else {})))
    elif outcome is None:
        err.print("nothing to do: the cluster's groups are the plan's", highlight=False)
    elif outcome == "done":
        err.print(
            f"done; back again: expertmesh rebalance {local.plan_before}", highlight=False, soft_wrap=True, markup=False
        )
    if outcome == "rolled back":
        if reason != "aborted":
            raise ClusterError(f"rolled back, the groups are those from before: {reason}")
        err.print("rolled back, the groups are those from before", highlight=False)


def _watch(
    running: Record,
    patience: Patience,
    limits: Limits,
    window_s: float,
    interval_s: float,
    *,
    observe: bool,
    json_lines: bool,
) -> None:
    # imported here: the planner loads numpy, which the command line does without
    from expertmesh.rebalance.controlled import ControlledCluster

    with _progress() as show:
        controller = Controller(limits, window_s, observe)
        for report in controller.reports(lambda: ControlledCluster(running, show, patience), interval_s):
            if json_lines:
                typer.echo(report.model_dump_json(exclude_none=True))
            else:
                out.print(report.text, highlight=False, soft_wrap=True, markup=False)


def _show_outlook(proposal: Proposal, *, json_lines: bool) -> None:
    if json_lines:
        typer.echo(proposal.outlook.model_dump_json())
        return
    found = proposal.outlook
    for name, others in (("stay", found.kept), ("other bounds", found.resized)):
        if others:
            out.print(f"{name}: {', '.join(others)}", highlight=False)
    for wanted, real in found.renamed.items():
        out.print(f"group {wanted} of the plan runs as {real}", highlight=False)
    for number, step in enumerate(found.steps, 1):
        out.print(f"{number:3}  {step}", highlight=False, soft_wrap=True)
    if not found.steps:
        out.print("nothing to do: the cluster's groups are the plan's")
    out.print(_outlook_table(found))
    if found.predicted_balancedness is not None:
        out.print(f"predicted balancedness: {found.predicted_balancedness:.3f}", highlight=False)


def _outlook_table(found: Outlook) -> Table:
    table = Table()
    for column in ("", "now", "at most during", "after"):
        table.add_column(column, justify="left" if not column else "right")
    stages = (found.now, found.peak, found.after)
    table.add_row("replicas", *(str(one.replicas) for one in stages))
    table.add_row("expert weights, GiB", *(f"{one.memory_gib:.3g}" for one in stages))
    table.add_row("CPUs", *(f"{one.num_cpus:g}" for one in stages))
    table.add_row("GPUs", *(f"{one.num_gpus:g}" for one in stages))
    return table


@contextmanager
def _locked(running: Record) -> Iterator[None]:
    """One rebalance at a time; says how to go on where it is left unfinished."""
    journals = JournalFile(record.state_dir(running.name))
    with journals.lock():
        try:
            yield
        except KeyboardInterrupt:
            if left := _unfinished(journals):
                err.print(f"interrupted; {left}", highlight=False, soft_wrap=True)
            raise
        except ExpertMeshError as error:
            left = _unfinished(journals)
            if not left or RESUME in str(error):
                raise
            raise ClusterError(f"{error}; {left}") from None


def _unfinished(journals: JournalFile) -> str:
    try:
        left = journals.read()
    except ClusterError:
        return ""
    if left is None:
        return ""
    return (
        f"{left.done} of {len(left.steps)} steps {'back ' * (left.direction == 'back')}are done: "
        f"`expertmesh rebalance {RESUME}` goes on, `--abort` goes back"
    )


@contextmanager
def _progress() -> Iterator[Show]:
    """A line for each change, on stderr."""
    began = time.monotonic()
    said = ""

    def show(progress: Progress) -> None:
        nonlocal said
        if progress.text != said:
            said = progress.text
            line = f"{time.monotonic() - began:5.0f} s  {said}"
            err.print(line, highlight=False, soft_wrap=True, markup=False)

    yield show
