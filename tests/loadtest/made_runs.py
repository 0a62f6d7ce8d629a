"""Runs made of random numbers, for tests of what is done with runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy

from loadtest.config import RunConfig
from loadtest.records import ExpertRows, FaultRecord, RequestRecord, Run, Sample, StageSpan, Status

SPANS = (
    StageSpan("warm-up", 0.0, 5.0, False),
    StageSpan("steady", 5.0, 15.0, True),
    StageSpan("peak", 15.0, 20.0, True),
)


def made_config(**overrides: Any) -> RunConfig:
    stages = [
        {"name": span.name, "duration_s": span.end_s - span.start_s, "measured": span.measured}
        | {"arrivals": {"kind": "poisson", "rate": 10}}
        for span in SPANS
    ]
    values = {
        "name": "made",
        "target": {"kind": "openai", "url": "http://127.0.0.1:1/v1"},
        "stages": stages,
        "objectives": {"ttft_ms": 150, "tpot_ms": 30, "share": 0.9},
        "repeats": 3,
    }
    return RunConfig.model_validate(values | overrides)


def made_records(repeat: int, *, rate: float = 10.0, slower: float = 1.0, seed: int = 0) -> Iterable[RequestRecord]:
    """About 1 in 50 fails; the time to the first token is log-normal around 60 ms."""
    generator = numpy.random.default_rng((seed, repeat))
    times = numpy.cumsum(generator.exponential(1 / rate, int(20 * rate * 2)))
    for index, due in enumerate(times[times < 20.0].tolist()):
        stage = next(span.name for span in SPANS if due < span.end_s)
        failed = generator.random() < 0.02
        tokens = int(generator.integers(2, 30))
        first = due + 0.06 * slower * float(generator.lognormal(0, 0.5))
        gaps = 0.01 * slower * generator.lognormal(0, 0.3, tokens)
        arrivals = () if failed else (first, *(first + numpy.cumsum(gaps[1:])).tolist())
        status: Status = "server_error" if failed else "ok"
        yield RequestRecord(
            repeat=repeat,
            stage=stage,
            index=index,
            turn=0,
            domain="code" if index % 3 else "chat",
            scheduled_s=due,
            sent_s=due + 0.001,
            token_times=arrivals,
            done_s=arrivals[-1] + 0.001 if arrivals else due + 0.02,
            prompt_tokens=20,
            output_tokens=0 if failed else tokens,
            status=status,
            error="HTTP 500: <b>no & luck</b>" if failed else "",
        )


def made_run(repeats: int = 3, *, slower: float = 1.0, seed: int = 0, **overrides: Any) -> Run:
    samples = [
        Sample(repeat, float(at_s), name, group, value)
        for repeat in range(repeats)
        for at_s in range(20)
        for group in "ab"
        for name, value in (
            ("replicas", 1.0 if group == "b" or at_s < 10 else 2.0),
            ("rows_per_s", 100.0 * at_s + (50 if group == "a" else 0)),
            ("busy", min(1.0, at_s / 20)),
            ("queued_rows", 7.0 * at_s if group == "a" else 0.0),
        )
    ]
    samples += [
        Sample(repeat, float(at_s), "engine_running", "h", 4.0) for repeat in range(repeats) for at_s in range(20)
    ]
    values: dict[str, Any] = {
        "stages": SPANS,
        "records": tuple(one for repeat in range(repeats) for one in made_records(repeat, slower=slower, seed=seed)),
        "samples": tuple(samples),
        "faults": tuple(FaultRecord(repeat, 8.0, "hang", "a-1234", 11.0) for repeat in range(repeats)),
        "repeats": repeats,
        "interrupted": False,
        "started_at": 1_790_000_000.0,
        "durations_s": (20.0,) * repeats,
        "client_processes": 1,
        "skew": tuple(ExpertRows(layer, expert, (expert + 1) * 100) for layer in range(4) for expert in range(16)),
    }
    return Run(**(values | overrides))
