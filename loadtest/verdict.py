"""What a run comes to: valid or not, objectives met or not, and the exit code that says so."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from rich.console import Console
from rich.table import Table

from loadtest import metrics
from loadtest.config import RunConfig
from loadtest.metrics import Figures
from loadtest.records import Run


class ExitCode(IntEnum):
    FINE = 0
    ERROR = 1
    """Bad input, or a target that does not answer: nothing was measured."""
    INVALID = 3
    """The client missed its schedule: the figures say nothing of the server."""
    MISSED = 4
    """Too few requests met the objectives."""
    REGRESSED = 5
    """`compare` found a figure that is worse than its threshold allows."""
    INTERRUPTED = 130


@dataclass(frozen=True)
class Verdict:
    figures: Figures
    lateness_p99_ms: float
    late: bool
    missed: bool
    interrupted: bool

    @property
    def exit_code(self) -> ExitCode:
        if self.interrupted:
            return ExitCode.INTERRUPTED
        if self.late:
            return ExitCode.INVALID
        return ExitCode.MISSED if self.missed else ExitCode.FINE


def judge(run: Run, config: RunConfig) -> Verdict:
    """Of the measured stages of all repeats together."""
    counting = metrics.measured(run.records, run.stages)
    seconds = sum(
        metrics.measured_seconds([one for one in counting if one.repeat == repeat], run.stages)
        for repeat in range(run.repeats)
    )
    figures = metrics.figures(counting, max(seconds, 1e-9), config.objectives)
    late = metrics.is_late(counting, config.client.max_lateness_ms)
    missed = bool(config.objectives.given) and figures.good_share < config.objectives.share
    return Verdict(figures, 1000 * metrics.lateness_p99_s(counting), late, missed, run.interrupted)


def print_verdict(verdict: Verdict, config: RunConfig, console: Console) -> None:
    """The table that a person wants to see first."""
    figures = verdict.figures
    table = Table("ms", "mean", "p50", "p90", "p99", "p99.9", box=None, padding=(0, 2), header_style="dim")
    for name in metrics.FIGURES:
        found = figures.distributions[name]
        if found is not None and (name != "itl" or found.maximum > 0):
            values = [found.mean, *(found.percentiles[percent] for percent in (50.0, 90.0, 99.0, 99.9))]
            table.add_row(name.upper(), *(f"{1000 * value:.1f}" for value in values))
    console.print(table)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(figures.statuses.items()))
    console.print(
        f"{figures.requests} requests ({counts or 'none'}) in {figures.seconds:.1f} s: "
        f"{figures.request_rate:.2f} answers/s, {figures.output_rate:.1f} tokens/s",
        highlight=False,
        soft_wrap=True,
    )
    if config.objectives.given:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in config.objectives.given.items())
        console.print(
            f"goodput {figures.goodput:.2f}/s: {figures.good_share:.1%} of the requests met {limits} "
            f"({'fewer than' if verdict.missed else 'at least'} {config.objectives.share:.1%})",
            highlight=False,
            soft_wrap=True,
        )
    limit_ms = config.client.max_lateness_ms
    if verdict.late:
        console.print(
            f"INVALID: the client was late, p99 {verdict.lateness_p99_ms:.1f} ms (limit {limit_ms:g} ms); "
            "give it more --processes or less to do",
            style="bold red",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(f"client lateness p99 {verdict.lateness_p99_ms:.1f} ms (limit {limit_ms:g} ms)", highlight=False)
    if verdict.interrupted:
        console.print("interrupted: the figures are those until then", style="bold yellow")
