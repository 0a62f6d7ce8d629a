"""`expertmesh loadtest`: synthetic traffic. Everything that it needs is imported when it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

RESULTS = Path("loadtest-results")


class RunByDefault(TyperGroup):
    """`loadtest RUN.yaml` is `loadtest run RUN.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


loadtest = typer.Typer(cls=RunByDefault, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@loadtest.callback()
def about() -> None:
    """Load-test a cluster, or any OpenAI-compatible endpoint, with synthetic traffic.

    `expertmesh loadtest RUN.yaml` is short for `expertmesh loadtest run RUN.yaml`.
    """


@loadtest.command()
def run(
    file: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="The run, a YAML file.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help=f"Directory of the results; default: {RESULTS}/NAME-TIME.", metavar="DIR"),
    ] = None,
    url: Annotated[str | None, typer.Option(help="The endpoint, up to and with /v1.")] = None,
    cluster: Annotated[str | None, typer.Option(help="A running cluster's name, or auto.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Chat completions.")] = False,
    rate: Annotated[float | None, typer.Option(help="One stage of Poisson arrivals, requests per second.")] = None,
    users: Annotated[int | None, typer.Option(help="One stage of a closed loop with so many users.")] = None,
    duration: Annotated[float | None, typer.Option(help="Of that stage, seconds.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Of every prompt.")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="Of every answer.")] = None,
    slo: Annotated[
        list[str] | None, typer.Option(help="An objective: ttft:MS, tpot:MS, e2e:MS, or share:0.99 of the requests.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same requests.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Times to repeat the run, for confidence.")] = None,
    processes: Annotated[int | None, typer.Option(help="Client processes.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Run the client processes on a Ray cluster: its address, or auto.")
    ] = None,
    find_max_rate: Annotated[
        bool, typer.Option("--find-max-rate", help="Search for the highest rate that meets the objectives.")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="Of the search, a share of the rate.", min=0.001, max=0.5)] = 0.03,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Send a run's traffic and report on it.

    Exit code 1: wrong input, or no target; 3: the client was late and the run is invalid; 4: objectives missed;
    130: interrupted, with a report of what there is.

    Example: expertmesh loadtest --url http://127.0.0.1:8000/v1 --rate 5 --slo ttft:500
    """
    from loadtest.flags import Flags, make_config

    flags = Flags(
        url=url,
        cluster=cluster,
        model=model,
        chat=chat,
        rate=rate,
        users=users,
        duration_s=duration,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        slo=slo or (),
        seed=seed,
        repeats=repeats,
        processes=processes,
    )
    config = make_config(file, flags)
    directory = out or RESULTS / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if find_max_rate:
        code = _find_max_rate(config, directory, tolerance, ray, as_json)
    else:
        code = _run(config, directory, ray, as_json)
    raise typer.Exit(code)


@loadtest.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="Directory of the results to compare with.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Directory of the results in question.")],
    threshold: Annotated[
        list[str] | None,
        typer.Option(help="How much worse a figure of B may be: FIGURE=PERCENT, for instance ttft_ms.p99=10."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON on stdout.")] = False,
) -> None:
    """Put two results side by side; exit code 5 where B is worse than its thresholds allow.

    Example: expertmesh loadtest compare results/main results/branch --threshold ttft_ms.p99=10
    """
    from expertmesh.commands.console import out
    from loadtest.compare import compare_runs, print_comparison
    from loadtest.verdict import ExitCode

    comparison = compare_runs(before, after, dict(map(_threshold, threshold or [])))
    if as_json:
        typer.echo(json.dumps(comparison.as_json(), indent=2))
    else:
        print_comparison(comparison, out)
    raise typer.Exit(ExitCode.REGRESSED if comparison.regressed else ExitCode.FINE)


@loadtest.command()
def schema() -> None:
    """Print the JSON Schema of a run's file.

    Example: expertmesh loadtest schema > docs/loadtest.schema.json
    """
    from loadtest.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


def _run(config: Any, directory: Path, ray: str | None, as_json: bool) -> int:
    from expertmesh.commands.console import err, out
    from loadtest.fleet import launcher
    from loadtest.report import summarize, write_results
    from loadtest.run import execute
    from loadtest.verdict import judge, print_verdict

    with _results_in(directory):
        found = execute(config, err, launcher(ray))
        with err.status("writing the report"):
            page = write_results(directory, found, config)
    verdict = judge(found, config)
    print_verdict(verdict, config, err if as_json else out)
    if as_json:
        typer.echo(json.dumps(summarize(found, config), indent=2))
    err.print(f"report: {page}", highlight=False, soft_wrap=True)
    return verdict.exit_code


def _find_max_rate(config: Any, directory: Path, tolerance: float, ray: str | None, as_json: bool) -> int:
    from expertmesh.commands.console import err, out
    from loadtest.capacity import CapacitySearch, as_values, print_capacity
    from loadtest.fleet import launcher
    from loadtest.verdict import ExitCode

    with _results_in(directory):
        found = CapacitySearch(config, err, launcher(ray)).run(tolerance)
        values = json.dumps(as_values(found, config), indent=2)
        (directory / "capacity.json").write_text(values + "\n")
    print_capacity(found, config, err if as_json else out)
    if as_json:
        typer.echo(values)
    if found.interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.MISSED if found.max_rate is None else ExitCode.FINE


@contextmanager
def _results_in(directory: Path) -> Iterator[None]:
    """The directory, made and empty, and gone again where nothing is written into it.

    Raises ConfigError where results could not be written there, or others would be mixed with them.
    """
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


def _threshold(text: str) -> tuple[str, float]:
    from expertmesh.errors import ConfigError

    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigError(f"--threshold {text}: not FIGURE=PERCENT") from None
