"""`expertmesh simulate`: a cluster that does not fit here. Everything that it needs is imported when it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer


def simulate(
    scenario: Annotated[Path | None, typer.Argument(metavar="[SCENARIO]", help="The scenario, a YAML file.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Directory for the results; made, or empty.", metavar="DIR")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Write report.html there too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a scenario and exit.")] = False,
) -> None:
    """Simulate a day of a large cluster, and compare scaling expert groups alone with scaling all together.

    The scaling policy is the one that a cluster runs; replicas, nodes and traffic are modelled.

    Example: expertmesh simulate examples/simulate/small.yaml -o results --report
    """
    from expertmesh.errors import ConfigError

    if schema:
        from expertmesh.simulation.scenario import Scenario

        typer.echo(json.dumps(Scenario.model_json_schema(), indent=2))
        return
    if scenario is None:
        raise ConfigError("simulate: needs a scenario; examples/simulate/small.yaml is one")
    if report and out is None:
        raise ConfigError("simulate: --report needs a directory, -o DIR")
    from expertmesh.simulation.scenario import read_scenario

    wanted = read_scenario(scenario)
    with nullcontext() if out is None else _results_in(out):
        _run(wanted, out, report, as_json)


def _run(wanted: Any, out: Path | None, report: bool, as_json: bool) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from expertmesh.commands.console import err
    from expertmesh.commands.console import out as console
    from expertmesh.simulation.report import write_results
    from expertmesh.simulation.results import caption, savings_table, summarize
    from expertmesh.simulation.run import simulate as run

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(wanted.name, total=wanted.ticks)
        found = run(wanted, lambda done: bar.update(task, completed=done), apart=True)
    summary = summarize(found)
    if out is not None:
        for path in write_results(out, found, summary, report):
            err.print(str(path), highlight=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    console.print(savings_table(summary))
    console.print(caption(summary), highlight=False)


@contextmanager
def _results_in(directory: Path) -> Iterator[None]:
    """The directory, made and empty, and gone again where nothing is written into it; raises ConfigError before the
    simulation where that could not be."""
    from expertmesh.errors import ConfigError

    try:
        directory.mkdir(parents=True, exist_ok=True)
        filled = any(directory.iterdir())
    except OSError as error:
        raise ConfigError(f"{directory}: {(error.strerror or str(error)).lower()}") from None
    if filled:
        raise ConfigError(f"{directory}: is not empty; results need a directory of their own")
    try:
        yield
    finally:
        if not any(directory.iterdir()):
            directory.rmdir()
