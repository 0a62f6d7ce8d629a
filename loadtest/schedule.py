"""Which sessions a run has, and when: a pure function of the config, its seed and the number of the repeat."""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from expertmesh.errors import ConfigError
from loadtest import lengths
from loadtest.arrivals import arrival_times
from loadtest.config import ClosedArrivals, DomainMix, OpenArrivals, RunConfig, Stage, TraceArrivals
from loadtest.records import StageSpan
from loadtest.trace import Trace, TraceEntry, read_trace

CLOSED_STRIDE = 1_000_000_000
"""Sessions of a closed stage are numbered apart from those of open ones, since how many there will be is not known."""


@dataclass(frozen=True, slots=True)
class TurnPlan:
    prompt_tokens: int
    output_tokens: int
    cancel_after: int | None


@dataclass(frozen=True, slots=True)
class Session:
    index: int
    stage: str
    scheduled_s: float
    """When its first turn is due, seconds from the run's start."""
    seed: int
    domain: str
    prefix: int | None
    prefix_tokens: int
    turns: tuple[TurnPlan, ...]
    think_s: float
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class OpenStage:
    """Sessions that are due whatever becomes of the others."""

    span: StageSpan
    first_index: int
    times: Sequence[float]
    """Seconds from the run's start, ascending."""
    entries: Sequence[TraceEntry] | None = None


@dataclass(frozen=True)
class ClosedStage:
    span: StageSpan
    first_index: int
    users: int
    think_s: float


class Schedule:
    """Of one repeat."""

    def __init__(self, config: RunConfig, repeat: int, domains: Sequence[str]) -> None:
        """Raises ConfigError for a trace or a lengths file that cannot be used."""
        self._config, self._repeat, self._domains = config, repeat, tuple(domains)
        self.stages: list[OpenStage | ClosedStage] = []
        self.notes: list[str] = []
        _check_lengths(config)
        start, index = 0.0, 0
        for number, stage in enumerate(config.stages):
            made = self._stage(stage, number, start, index)
            self.stages.append(made)
            start = made.span.end_s
            index += len(made.times) if isinstance(made, OpenStage) else 0
        if not index and not any(isinstance(stage, ClosedStage) for stage in self.stages):
            raise ConfigError("stages: not one arrival; raise the rate or the duration")

    @property
    def spans(self) -> tuple[StageSpan, ...]:
        return tuple(stage.span for stage in self.stages)

    @property
    def duration_s(self) -> float:
        return self.stages[-1].span.end_s

    def sessions(self, stage: OpenStage, shard: int, shards: int) -> Iterator[Session]:
        """The share of one client process, in order of time."""
        for place, at_s in enumerate(stage.times):
            index = stage.first_index + place
            if index % shards == shard:
                entry = None if stage.entries is None else stage.entries[place]
                yield self.session(stage.span.name, index, at_s, entry)

    def session(self, stage: str, index: int, at_s: float, entry: TraceEntry | None = None) -> Session:
        """The same for the same seed, repeat, index and time, whatever came before."""
        generator = random.Random(f"{self._config.seed}/{self._repeat}/{index}")
        seed = generator.getrandbits(62)
        if self._config.target.kind == "experts":
            rows = lengths.draw(self._config.rows.rows, generator)
            return Session(index, stage, at_s, seed, "", None, 0, (TurnPlan(rows, 0, None),), 0)
        text = self._config.text
        count = 1 if text.turns is None else lengths.draw(text.turns.number, generator)
        turns = tuple(self._turn(generator, entry) for _ in range(1 if entry else count))
        prefix, prefix_tokens, shared = None, 0, text.shared_prefix
        draw, which = generator.random(), generator.random()
        if shared is not None and draw < shared.share:
            prefix, prefix_tokens = int(which * shared.count), shared.tokens
        domain = choose_domain(text.domains, self._domains, at_s, generator.random())
        think_s = 0.0 if text.turns is None else text.turns.think_s
        blocks = entry.blocks if entry else ()
        return Session(index, stage, at_s, seed, domain, prefix, prefix_tokens, turns, think_s, blocks)

    def _turn(self, generator: random.Random, entry: TraceEntry | None) -> TurnPlan:
        text = self._config.text
        prompt, output = lengths.draw(text.prompt_tokens, generator), lengths.draw(text.output_tokens, generator)
        if entry is not None:
            prompt, output = entry.prompt_tokens, entry.output_tokens
        chance, cancel_after = generator.random(), None
        if text.cancel is not None and chance < text.cancel.share:
            cancel_after = lengths.draw(text.cancel.after_tokens, generator)
        return TurnPlan(prompt, output, cancel_after)

    def _stage(self, stage: Stage, number: int, start: float, index: int) -> OpenStage | ClosedStage:
        arrivals = stage.arrivals
        if isinstance(arrivals, TraceArrivals):
            trace = read_trace(arrivals)
            self._note(stage, trace)
            last = trace.entries[-1].at_s
            span = StageSpan(stage.name, start, start + (stage.duration_s or max(last, 1.0)), stage.measured)
            kept = [entry for entry in trace.entries if start + entry.at_s <= span.end_s]
            return OpenStage(span, index, [start + entry.at_s for entry in kept], kept)
        assert stage.duration_s is not None
        span = StageSpan(stage.name, start, start + stage.duration_s, stage.measured)
        if isinstance(arrivals, ClosedArrivals):
            return ClosedStage(span, CLOSED_STRIDE * (number + 1), arrivals.users, arrivals.think_s)
        assert isinstance(arrivals, OpenArrivals)
        generator = np.random.default_rng([self._config.seed, self._repeat, number])
        times = start + arrival_times(arrivals, stage.duration_s, generator)
        return OpenStage(span, index, times.tolist())

    def _note(self, stage: Stage, trace: Trace) -> None:
        if trace.left_out:
            self.notes.append(
                f"stage {stage.name}: {trace.left_out} requests of the trace had failed and were left out"
            )


def choose_domain(mixes: Sequence[DomainMix], domains: Sequence[str], at_s: float, draw: float) -> str:
    """The domain of a session that begins at `at_s`; `draw` is uniform in [0, 1)."""
    if not mixes:
        return domains[int(draw * len(domains))]
    mix = mixes[max(0, bisect.bisect_right([mix.at_s for mix in mixes], at_s) - 1)]
    rest = draw * sum(mix.weights.values())
    for domain, weight in mix.weights.items():
        rest -= weight
        if rest < 0:
            return domain
    return max(mix.weights, key=lambda domain: mix.weights[domain])


def _check_lengths(config: RunConfig) -> None:
    if config.target.kind == "experts":
        return lengths.check(config.rows.rows)
    text = config.text
    lengths.check(text.prompt_tokens)
    lengths.check(text.output_tokens)
    if text.turns is not None:
        lengths.check(text.turns.number)
    if text.cancel is not None:
        lengths.check(text.cancel.after_tokens)
    return None
