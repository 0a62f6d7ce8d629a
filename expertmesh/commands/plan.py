"""`expertmesh plan`: experts divided into groups by their loads, beside today's groups and a baseline."""

from __future__ import annotations

import json as json_text
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.commands.console import err, out
from expertmesh.commands.plan_inputs import DeviceChoice, Subject, find_capacity, find_loads, find_subject
from expertmesh.commands.plan_tables import comparison_table, groups_table
from expertmesh.commands.tls_options import Tls, TlsName, tls_files
from expertmesh.errors import ConfigError
from expertmesh.placement.capacity import Capacity
from expertmesh.placement.make import Bounds, Proposal, propose
from expertmesh.placement.plan import plan_text
from expertmesh.placement.planner import NO_COACTIVATION, Aims
from expertmesh.placement.refine import Objective
from expertmesh.placement.sizing import sizing_text


def plan(
    name: Annotated[str | None, typer.Argument(metavar="[CLUSTER]", help="A running cluster's name.")] = None,
    artifact: Annotated[Path | None, typer.Option(help="Plan for this artifact, without a cluster.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Whose groups are today's; its artifact, if none is named.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Plan for a published model, or layers=32,experts=8,top_k=2,hidden=4096,…")
    ] = None,
    directory: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of the cluster that serves the artifact, for its loads.")
    ] = None,
    tls: Tls = None,
    tls_name: TlsName = None,
    loads: Annotated[Path | None, typer.Option(help="Loads, JSON or YAML; default: the cluster's, or uniform.")] = None,
    window: Annotated[float, typer.Option(help="Of the cluster's loads, seconds.", min=1, max=600)] = 60,
    tokens_per_s: Annotated[float, typer.Option(help="Where loads are uniform.", min=1e-6)] = 1,
    groups: Annotated[int | None, typer.Option(help="Default: as many as are worth it.", min=1, max=1024)] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            help="Experts that fire together, which only --loads tells: apart (spread, the default) or in one "
            "group (gather)."
        ),
    ] = None,
    memory_gib: Annotated[float | None, typer.Option(help="Of experts in one replica.", min=1e-9)] = None,
    rows_per_replica: Annotated[
        float | None, typer.Option(help="Rows/s that a replica sustains, over all layers.", min=1e-9)
    ] = None,
    teraflops: Annotated[float | None, typer.Option(help="Of a modelled device, instead.", min=1e-9)] = None,
    memory_gb_per_s: Annotated[float | None, typer.Option(help="Of the modelled device.", min=1e-9)] = None,
    batch_rows: Annotated[int, typer.Option(help="Rows in a batch of the modelled device.", min=1)] = 256,
    target_busy: Annotated[float | None, typer.Option(help="Default: the config's.", min=0.01, max=0.95)] = None,
    max_replicas: Annotated[int | None, typer.Option(help="Of any group.", min=1, max=100_000)] = None,
    growth: Annotated[float, typer.Option(help="Groups may grow to carry so many times the loads.", min=1)] = 3,
    second_homes: Annotated[
        int, typer.Option(help="Places per layer that experts may have in further groups.", min=0)
    ] = 0,
    sleep: Annotated[bool, typer.Option("--sleep", help="Cold groups may have no replica while idle.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan there.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """Divide experts into groups by their loads, and show what that would bring. Changes nothing that runs.

    Example: expertmesh plan --groups 4 -o plan.yaml

    Elsewhere: expertmesh plan --artifact ./artifact --directory 127.0.0.1:9000 --window 600
    """
    subject = find_subject(name, artifact, config, shape, directory, tls_files(tls, tls_name))
    known, origin = find_loads(subject, loads, window, tokens_per_s)
    busy = target_busy or (subject.config.scaling.target_busy if subject.config else 0.6)
    capacity = find_capacity(
        subject, known, busy, DeviceChoice(rows_per_replica, teraflops, memory_gb_per_s, batch_rows), window
    )
    today = subject.config.groups if subject.config else ()
    if memory_gib is None:
        memory_gib = max((group.memory_gib for group in today if group.memory_gib), default=None)
    aims = Aims(capacity.rows_per_s, busy, groups, memory_gib, max_replicas, objective or "spread", second_homes)
    made = propose(subject.manifest, known, aims, Bounds(growth, sleep), today)
    if objective is not None and not known.coactivation:
        made = replace(made, remarks=(*made.remarks, f"objective {objective}: {NO_COACTIVATION}"))
    if output is not None:
        _write(output, plan_text(made.plan))
    if json:
        typer.echo(_json(subject, made, origin, capacity))
        return
    _show(subject, made, f"loads: {origin}", f"one replica: {capacity.rows_per_s:,.4g} rows/s ({capacity.source})")
    if output is not None:
        err.print(f"{output}: the plan; apply it with `expertmesh rebalance`", highlight=False, soft_wrap=True)


def _show(subject: Subject, made: Proposal, *notes: str) -> None:
    out.print(sizing_text(subject.sizing), highlight=False, soft_wrap=True)
    for note in notes:
        out.print(note, highlight=False, soft_wrap=True)
    out.print(comparison_table(made))
    if made.today_groups:
        out.print(groups_table("today's groups at these loads", made.today_groups))
    out.print(groups_table("groups of this plan", made.groups))
    for remark in made.remarks:
        out.print(f"! {remark}", highlight=False, soft_wrap=True)


def _json(subject: Subject, made: Proposal, origin: str, capacity: Capacity) -> str:
    whole = {
        "sizing": subject.sizing.model_dump(),
        "loads": origin,
        "rows_per_replica": capacity.rows_per_s,
        "rows_per_replica_source": capacity.source,
        "today": made.today and made.today.model_dump(exclude={"group_replicas"}),
        "planned": made.planned.model_dump(exclude={"group_replicas"}),
        "eplb": made.eplb.model_dump(exclude={"group_replicas"}),
        "today_groups": [one.model_dump() for one in made.today_groups],
        "groups": [one.model_dump() for one in made.groups],
        "remarks": made.remarks,
        "plan": made.plan.model_dump(mode="json", exclude_none=True),
    }
    return json_text.dumps(whole, indent=2)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None
