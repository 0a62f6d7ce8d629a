"""The highest rate that still meets the objectives: rates that double until one does not, then bisection."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from expertmesh.errors import ConfigError
from loadtest import metrics
from loadtest.client_process import make_schedule
from loadtest.config import OpenArrivals, RunConfig
from loadtest.fleet import Launch, LocalMember
from loadtest.metrics import Figures
from loadtest.progress import Progress, Standing
from loadtest.records import RequestRecord, StageSpan
from loadtest.run import Checked, Repeat, interruptible, run_repeat
from loadtest.schedule import ClosedStage, OpenStage

Outcome = Literal["met", "missed", "saturated", "late client"]
MAX_RATE = 1e6
GROWTH = 0.05
"""Share of the arrivals by which the queue grows, beyond chance, where a server is saturated."""


@dataclass(frozen=True)
class Trial:
    """One rate, tried."""

    rate: float
    outcome: Outcome
    figures: Figures
    cut_short: bool
    """Ended early, when so many requests had missed the objectives that the rest could change nothing."""
    lateness_p99_ms: float


@dataclass(frozen=True)
class Capacity:
    trials: tuple[Trial, ...]
    """In the order in which they were made."""
    interrupted: bool

    @property
    def max_rate(self) -> float | None:
        """The highest rate that met the objectives, below the lowest that did not; None where none did."""
        failed = min((trial.rate for trial in self.trials if trial.outcome != "met"), default=math.inf)
        met = [trial.rate for trial in self.trials if trial.outcome == "met" and trial.rate < failed]
        return max(met, default=None)

    @property
    def first_beyond(self) -> Trial | None:
        """The lowest rate that failed."""
        failed = [trial for trial in self.trials if trial.outcome != "met"]
        return min(failed, key=lambda trial: trial.rate, default=None)


def search(attempt: Callable[[float], Outcome | None], start: float, tolerance: float) -> None:
    """Calls `attempt` with one rate after another, until the highest good one is known to a share of `tolerance`.

    Doubles while rates are good, halves while they are bad, then bisects. Ends at once where `attempt` gives None, and
    where the client gives way before the server does.
    """
    low, high, rate = 0.0, math.inf, start
    while rate <= MAX_RATE and rate >= start / 1024:
        outcome = attempt(rate)
        if outcome is None or outcome == "late client":
            return
        if outcome == "met":
            low = rate
        else:
            high = rate
        if math.isinf(high):
            rate *= 2
        elif not low:
            rate /= 2
        elif high / low <= 1 + tolerance:
            return
        else:
            rate = (low + high) / 2


def is_saturated(records: Sequence[RequestRecord], span: StageSpan) -> bool:
    """Whether requests without a first token became more and more in the second half of the stage.

    The growth is that of a line through the queue's length; chance alone moves it by the root of the arrivals.
    """
    middle = (span.start_s + span.end_s) / 2
    at = np.linspace(middle, span.end_s, 50)
    came = np.sort([record.scheduled_s for record in records])
    began = np.sort([_left_queue(record) for record in records])
    queue = np.searchsorted(came, at, side="right") - np.searchsorted(began, at, side="right")
    growth = float(np.polyfit(at, queue, 1)[0]) * (span.end_s - middle)
    arrived = int(((came >= middle) & (came <= span.end_s)).sum())
    return growth > max(GROWTH * arrived, 3 * math.sqrt(arrived))


def _left_queue(record: RequestRecord) -> float:
    return record.done_s if record.first_token_s is None else record.first_token_s


class CapacitySearch:
    """Against a running target. A trial is the run's stages with the measured ones at the trial's rate."""

    def __init__(self, config: RunConfig, console: Console, launch: Launch = LocalMember) -> None:
        """Raises ExpertMeshError where the run cannot begin, or has nothing to search with."""
        self._config, self._console = config, console
        if not config.objectives.given:
            raise ConfigError("objectives: a search needs one, for instance --slo ttft:500")
        self._start = _first_rate(config)
        with console.status("checking the target"):
            self._checked = Checked(config, launch)
        self._trials: list[Trial] = []

    def run(self, tolerance: float) -> Capacity:
        try:
            with interruptible() as stopped, Progress(self._console) as progress:
                search(lambda rate: self._attempt(rate, progress, stopped), self._start, tolerance)
            return Capacity(tuple(self._trials), stopped.is_set())
        finally:
            self._checked.close()

    def _attempt(self, rate: float, progress: Progress, stopped: threading.Event) -> Outcome | None:
        number = len(self._trials)
        if number and stopped.wait(self._config.pause_s):
            return None
        checked = self._checked
        checked.config = at_rate(self._config, rate)
        checked.schedule = make_schedule(checked.config, number, checked.texts)
        measured = {span.name for span in checked.schedule.spans if span.measured}
        due = sum(_count(stage) for stage in checked.schedule.stages if stage.span.name in measured)
        allowed = (1 - self._config.objectives.share) * due
        hopeless = Hopeless(self._config, measured, allowed)
        repeat = run_repeat(checked, number, progress, stopped, hopeless)
        if stopped.is_set():
            return None
        trial = self._judge(rate, repeat, hopeless.is_so, checked.schedule.spans)
        self._trials.append(trial)
        self._console.print(_line(trial), highlight=False, soft_wrap=True)
        return trial.outcome

    def _judge(self, rate: float, repeat: Repeat, cut_short: bool, spans: Sequence[StageSpan]) -> Trial:
        records = metrics.measured(repeat.records, spans)
        seconds = metrics.measured_seconds(records, spans)
        if cut_short:
            seconds = repeat.duration_s - min(span.start_s for span in spans if span.measured)
        figures = metrics.figures(records, max(seconds, 1e-9), self._config.objectives)
        outcome: Outcome = "met"
        if metrics.is_late(records, self._config.client.max_lateness_ms):
            outcome = "late client"
        elif not cut_short and any(is_saturated(records, span) for span in spans if span.measured):
            outcome = "saturated"
        elif cut_short or figures.good_share < self._config.objectives.share:
            outcome = "missed"
        return Trial(rate, outcome, figures, cut_short, 1000 * metrics.lateness_p99_s(records))


class Hopeless:
    """Judge of a trial: ends it once more requests missed the objectives than may, whatever the rest will do."""

    def __init__(self, config: RunConfig, measured: set[str], allowed: float) -> None:
        self._objectives, self._measured, self._allowed = config.objectives, measured, allowed
        self._seen = self._bad = 0
        self.is_so = False

    def __call__(self, repeat: Repeat, _standing: Standing) -> bool:
        for record in repeat.records[self._seen :]:
            counts = record.stage in self._measured and record.status not in {"cancelled", "unfinished"}
            self._bad += counts and not metrics.is_good(record, self._objectives)
        self._seen = len(repeat.records)
        self.is_so = self.is_so or self._bad > self._allowed
        return self.is_so


def at_rate(config: RunConfig, rate: float) -> RunConfig:
    """The run with its measured stages scaled so that the first begins at `rate`."""
    factor = rate / _first_rate(config)
    stages = []
    for stage in config.stages:
        arrivals = stage.arrivals
        if stage.measured and isinstance(arrivals, OpenArrivals):
            to_rate = None if arrivals.to_rate is None else arrivals.to_rate * factor
            scaled = arrivals.model_copy(update={"rate": arrivals.rate * factor, "to_rate": to_rate})
            stages.append(stage.model_copy(update={"arrivals": scaled}))
        else:
            stages.append(stage)
    return config.model_copy(update={"stages": tuple(stages), "repeats": 1, "faults": ()})


def print_capacity(capacity: Capacity, config: RunConfig, console: Console) -> None:
    """The table in order of the rates, and where the knee is."""
    table = Table("rate /s", "answers/s", "TTFT p50", "p99", "TPOT p50", "good", "", box=None, padding=(0, 2))
    for trial in sorted(capacity.trials, key=lambda trial: trial.rate):
        style = "bold" if trial.rate == capacity.max_rate else ""
        table.add_row(*_cells(trial), style=style)
    console.print(table)
    if capacity.interrupted:
        console.print("interrupted: the search is not at its end", style="bold yellow")
    limits = ", ".join(f"{name} {limit:g} ms" for name, limit in config.objectives.given.items())
    wanted = f"{config.objectives.share:.1%} of the requests within {limits}"
    beyond = capacity.first_beyond
    if capacity.max_rate is None:
        console.print(f"no rate that was tried keeps {wanted}", highlight=False, soft_wrap=True)
        return
    console.print(
        f"knee: {capacity.max_rate:.3g} requests/s keep {wanted}", style="bold", highlight=False, soft_wrap=True
    )
    if beyond is not None:
        console.print(f"at {beyond.rate:.3g}/s: {beyond.outcome}", highlight=False)


def _cells(trial: Trial) -> tuple[str, ...]:
    def ms(name: str, percent: float) -> str:
        found = trial.figures.distributions[name]
        return "" if found is None else f"{1000 * found.percentiles[percent]:.1f} ms"

    figures = trial.figures
    outcome = trial.outcome + (", cut short" if trial.cut_short else "")
    shown = (f"{trial.rate:.3g}", f"{figures.request_rate:.3g}", ms("ttft", 50.0), ms("ttft", 99.0), ms("tpot", 50.0))
    return (*shown, f"{figures.good_share:.1%}", outcome)


def _line(trial: Trial) -> str:
    rate, answers, _p50, p99, _tpot, good, outcome = _cells(trial)
    return f"{rate}/s: {outcome}; {answers} answers/s, TTFT p99 {p99 or 'unknown'}, {good} good"


def _count(stage: OpenStage | ClosedStage) -> int:
    return len(stage.times) if isinstance(stage, OpenStage) else 0


def _first_rate(config: RunConfig) -> float:
    for stage in config.stages:
        if stage.measured:
            if not isinstance(stage.arrivals, OpenArrivals):
                raise ConfigError(
                    f"stages: {stage.name}: a search needs arrivals with a rate, not {stage.arrivals.kind}"
                )
            return stage.arrivals.rate
    raise ConfigError("stages: none is measured")


def as_values(capacity: Capacity, config: RunConfig) -> dict[str, object]:
    """What capacity.json holds."""
    trials = [
        {
            "rate": trial.rate,
            "outcome": trial.outcome,
            "cut_short": trial.cut_short,
            "answers_per_s": trial.figures.request_rate,
            "goodput_per_s": trial.figures.goodput,
            "good_share": trial.figures.good_share,
            "requests": trial.figures.requests,
            "lateness_p99_ms": trial.lateness_p99_ms,
            "p50_p99_ms": {
                name: [1000 * found.percentiles[50.0], 1000 * found.percentiles[99.0]]
                for name, found in trial.figures.distributions.items()
                if found is not None
            },
        }
        for trial in capacity.trials
    ]
    objectives = config.objectives.given | {"share": config.objectives.share}
    return {
        "max_rate": capacity.max_rate,
        "interrupted": capacity.interrupted,
        "objectives_ms": objectives,
        "trials": trials,
        "config": config.model_dump(mode="json"),
    }
