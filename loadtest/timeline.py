"""What happened when, from a run's records: rates, open requests and latencies over time; pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from loadtest.config import RunConfig
from loadtest.records import RequestRecord, Run, Sample

BINS = 60
MAX_POINTS = 3000
LEAST_MS = 0.1
"""Where logarithmic axes begin; what is shorter is drawn there."""
COUNTERS = {"engine_generated_tokens": "engine_tokens_per_s", "engine_prompt_tokens": "engine_prompt_tokens_per_s"}
Row = dict[str, Any]


def bin_width_s(end_s: float) -> float:
    """A round width that gives BINS bins at most."""
    for width in (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0):
        if end_s <= BINS * width:
            return width
    return 3600.0


def rates(run: Run) -> list[Row]:
    """{repeat, at_s, what, value}: requests `due`, `answered`, `failed` and `tokens`, each per second."""
    found: list[Row] = []
    for repeat, records in by_repeat(run):
        edges, width = _edges(records)
        times = {
            "due": [record.scheduled_s for record in records],
            "answered": [record.done_s for record in records if record.status == "ok"],
            "failed": [record.done_s for record in records if record.status not in ("ok", "cancelled", "unfinished")],
            "tokens": [time for record in records for time in record.token_times],
        }
        for what, values in times.items():
            counts, _ = numpy.histogram(values, edges)
            found += _rows(repeat, edges, what, counts / width)
    return found


def open_requests(run: Run) -> list[Row]:
    """{repeat, at_s, what, value}: requests `waiting` for their first token and `answering`, at each bin's begin."""
    found: list[Row] = []
    for repeat, records in by_repeat(run):
        edges, _ = _edges(records)
        due = _before([record.scheduled_s for record in records], edges)
        first = _before([_first_or_end(record) for record in records], edges)
        done = _before([record.done_s for record in records], edges)
        found += _rows(repeat, edges, "waiting for the first token", due - first)
        found += _rows(repeat, edges, "answering", first - done)
    return found


def latencies(run: Run, config: RunConfig) -> list[Row]:
    """{repeat, at_s, what, ms, status}: one point per request, when it was due: time to first token (of an expert
    tier: to the answer), and how long it took to fail. At most MAX_POINTS per repeat, evenly taken; failures first."""
    what = "first token" if config.target.kind == "openai" else "answer"
    found: list[Row] = []
    for repeat, records in by_repeat(run):
        failed = [record for record in records if record.status != "ok"]
        answered = [record for record in records if record.status == "ok"]
        for record in _evenly(failed, MAX_POINTS // 2) + _evenly(answered, MAX_POINTS // 2):
            took_s = (_first_or_end(record) if record.status == "ok" else record.done_s) - record.scheduled_s
            at_s = round(record.scheduled_s, 3)
            ms = round(max(1000 * took_s, LEAST_MS), 3)
            found.append({"repeat": repeat, "at_s": at_s, "what": what, "ms": ms, "status": record.status})
    return found


def quantiles(values: dict[str, NDArray[numpy.float64]]) -> list[Row]:
    """{figure, ms, share}: curves of each figure's distribution, finer towards the tail."""
    shares = numpy.unique(numpy.concatenate([numpy.linspace(0, 0.99, 100), 1 - numpy.logspace(-2, -4, 30), [1.0]]))
    found: list[Row] = []
    for name, seconds in values.items():
        if len(seconds):
            for share, value in zip(shares, numpy.quantile(seconds, shares), strict=True):
                found.append({"figure": name, "ms": max(1000 * float(value), LEAST_MS), "share": float(share)})
    return found


def sampled(samples: Sequence[Sample], name: str) -> list[Row]:
    """{repeat, at_s, what, value} of one series; `what` is its label."""
    return [
        {"repeat": one.repeat, "at_s": round(one.at_s, 3), "what": one.label, "value": one.value}
        for one in samples
        if one.name == name
    ]


def per_second(samples: Sequence[Sample], name: str) -> list[Row]:
    """As `sampled`, of a counter: its rise per second since the sample before; a restart counts from 0."""
    last: dict[tuple[int, str], Sample] = {}
    found: list[Row] = []
    for one in samples:
        if one.name != name:
            continue
        before = last.get((one.repeat, one.label))
        last[one.repeat, one.label] = one
        if before is not None and one.at_s > before.at_s:
            rise = one.value - before.value if one.value >= before.value else one.value
            rate = rise / (one.at_s - before.at_s)
            found.append({"repeat": one.repeat, "at_s": round(one.at_s, 3), "what": one.label, "value": rate})
    return found


def by_repeat(run: Run) -> list[tuple[int, list[RequestRecord]]]:
    """Those repeats that have records."""
    found: dict[int, list[RequestRecord]] = {}
    for record in run.records:
        found.setdefault(record.repeat, []).append(record)
    return sorted(found.items())


def _edges(records: Sequence[RequestRecord]) -> tuple[NDArray[numpy.float64], float]:
    end_s = max(max(record.done_s, record.scheduled_s) for record in records)
    width = bin_width_s(end_s)
    return numpy.arange(0, numpy.floor(end_s / width) + 2) * width, width


def _before(times: Sequence[float], edges: NDArray[numpy.float64]) -> NDArray[numpy.int64]:
    return numpy.searchsorted(numpy.sort(times), edges[:-1], side="right")


def _first_or_end(record: RequestRecord) -> float:
    return record.done_s if record.first_token_s is None else record.first_token_s


def _rows(repeat: int, edges: NDArray[numpy.float64], what: str, values: NDArray[Any]) -> list[Row]:
    return [
        {"repeat": repeat, "at_s": round(float(at_s), 3), "what": what, "value": round(float(value), 3)}
        for at_s, value in zip(edges[:-1], values, strict=True)
    ]


def _evenly(records: Sequence[RequestRecord], count: int) -> list[RequestRecord]:
    if len(records) <= count:
        return list(records)
    return [records[round(place)] for place in numpy.linspace(0, len(records) - 1, count).tolist()]
