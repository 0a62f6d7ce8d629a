"""What the client measures is what a stub server of known latencies injected, to 2 %, also when it stalls.

The stub and the client share time.monotonic(). What a request ought to have met follows from when it was due: the
stub's latencies, and its stall, begin there, and whatever the client adds is its error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from stub import StubServer, config_for, execute_quietly, poisson, stub_server

from loadtest import metrics
from loadtest.config import RunConfig
from loadtest.records import RequestRecord, Run

TTFT_S, ITL_S, TOKENS = (0.2, 0.6), (0.04, 0.06), 20
WORKLOAD = {"output_tokens": {"kind": "fixed", "value": TOKENS}, "prompt_tokens": {"kind": "fixed", "value": 32}}
STALL_S = 2.0


def measure(stub: StubServer, stall_after_s: float | None = None, **sections: Any) -> tuple[Run, RunConfig]:
    config = config_for(stub.url, poisson(25, 8), workload=WORKLOAD, **sections)
    if stall_after_s is not None:
        threading.Timer(stall_after_s, stub.get, [f"/stall/0.5/{STALL_S}"]).start()
    return execute_quietly(config), config


def injected(run: Run, stub: StubServer) -> list[RequestRecord]:
    """The records as they would be if client and wire took no time: each answer is begun at the moment it was due."""
    log = stub.log()
    found = []
    for record in run.records:
        entry = log[f"loadtest-{record.repeat}-{record.index}-{record.turn}"]
        times = tuple(record.scheduled_s + due - entry["arrived"] for due in entry["due"])
        found.append(replace(record, token_times=times))
    return found


def assert_close(found: Sequence[RequestRecord], truth: Sequence[RequestRecord], percents: dict[str, float]) -> None:
    """Mean, median and a percentile of each figure, to 2 %."""
    mine, theirs = metrics.values_of(found), metrics.values_of(truth)
    for name, percent in percents.items():
        for statistic in (np.mean, np.median, lambda values, at=percent: np.percentile(values, at)):
            assert statistic(mine[name]) == pytest.approx(statistic(theirs[name]), rel=0.02), name


def goodput_limits(truth: Sequence[RequestRecord]) -> dict[str, float]:
    """Objectives that about half of the requests meet, each in the middle of a gap, so that a hair decides nothing."""
    values = metrics.values_of(truth)
    return {f"{name}_ms": 1000 * _gap_near(values[name], 70) for name in ("ttft", "tpot", "e2e")}


def _gap_near(values: np.ndarray, percent: float) -> float:
    ordered = np.sort(values)
    low = int(len(ordered) * (percent - 10) / 100)
    gaps = np.diff(ordered[low : int(len(ordered) * (percent + 10) / 100)])
    widest = low + int(gaps.argmax())
    return float(ordered[widest] + ordered[widest + 1]) / 2


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_latencies_are_those_injected(api: str) -> None:
    with stub_server("--ttft", *map(str, TTFT_S), "--itl", *map(str, ITL_S)) as stub:
        run, config = measure(stub, target={"api": api})
        truth = injected(run, stub)
    assert len(run.records) > 120
    assert {record.status for record in run.records} == {"ok"}
    assert_close(run.records, truth, dict.fromkeys(metrics.FIGURES, 90))
    limits = config.objectives.model_validate(goodput_limits(truth))
    found, wanted = (metrics.figures(records, 8, limits) for records in (run.records, truth))
    assert 0.3 < wanted.good_share < 0.9
    assert found.good_share == pytest.approx(wanted.good_share, rel=0.02)


def test_a_stall_of_two_seconds_counts_in_full() -> None:
    """Against what the schedule and the stub's own clock say, not against when the stub saw a request."""
    with stub_server("--ttft", "0.3", "--itl", "0.05") as stub:
        run, config = measure(stub, stall_after_s=4)
        begin, end = stall_of(stub)
        began = run_began(run, stub)
    truth = [
        replace(record, token_times=ideal(record.scheduled_s, begin - began, end - began)) for record in run.records
    ]
    assert {record.status for record in run.records} == {"ok"}
    # after the stall the stub writes to all streams at once, which parts the tokens of one by some milliseconds
    assert_close(run.records, truth, {"ttft": 95, "tpot": 95, "e2e": 95, "itl": 50})
    waited, should_wait = (sum(metrics.ttft_s(one) > 0.4 for one in records) for records in (run.records, truth))
    assert waited == pytest.approx(should_wait, abs=2)
    assert waited > 40
    worst = max(metrics.ttft_s(record) for record in run.records)
    assert worst == pytest.approx(max(metrics.ttft_s(record) for record in truth), rel=0.02)
    gaps = metrics.values_of(run.records)["itl"]
    assert gaps.max() == pytest.approx(STALL_S + 0.05, rel=0.02)
    limits = config.objectives.model_validate({"ttft_ms": 1000, "tpot_ms": 100})
    found, wanted = (metrics.figures(records, 8, limits) for records in (run.records, truth))
    assert found.good_share == pytest.approx(wanted.good_share, rel=0.02)
    assert metrics.lateness_p99_s(run.records) < STALL_S / 4, "the client stalled too"


def stall_of(stub: StubServer) -> tuple[float, float]:
    begin, end = stub.get("/log")["stall"]
    return begin, end


def run_began(run: Run, stub: StubServer) -> float:
    """time.monotonic() of the run's second 0, from the request that came to the stub fastest."""
    log = stub.log()
    return min(log[f"loadtest-0-{one.index}-{one.turn}"]["arrived"] - (one.sent_s or 0) for one in run.records)


def ideal(due_s: float, stall_begin_s: float, stall_end_s: float) -> tuple[float, ...]:
    """When the tokens of a request come that reaches the stub at the moment it is due."""
    length = stall_end_s - stall_begin_s

    def thawed(at_s: float) -> float:
        return at_s if at_s < stall_begin_s else max(stall_begin_s, at_s - length)

    own = [thawed(due_s) + 0.3 + 0.05 * index for index in range(TOKENS)]
    return tuple(at_s if at_s < stall_begin_s else at_s + length for at_s in own)


def test_requests_leave_as_a_poisson_process() -> None:
    """As sent, by the client's own clock, and as received, by the stub's."""
    with stub_server("--ttft", "0.01", "--itl", "0.001") as stub:
        config = config_for(stub.url, poisson(100, 10), workload={"output_tokens": {"kind": "fixed", "value": 2}})
        run = execute_quietly(config)
        arrived = np.sort([entry["arrived"] for name, entry in stub.log().items() if name.startswith("loadtest-0-")])
    sent = np.sort([record.sent_s for record in run.records])
    assert len(sent) > 800
    for times in (sent, arrived[-len(sent) :]):
        gaps = np.diff(times)
        assert stats.kstest(gaps / gaps.mean(), "expon").pvalue > 0.01


def test_the_clock_of_stub_and_client_is_one() -> None:
    with stub_server() as stub:
        before = time.monotonic()
        begin = stub.get("/stall/0/0.001")["begin"]
        assert before <= begin <= time.monotonic()
