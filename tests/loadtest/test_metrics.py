"""The figures are those of `vllm bench serve`, from the same answers."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from loadtest import metrics
from loadtest.config import Objectives
from loadtest.records import RequestRecord, StageSpan, Status

NONE = Objectives()


def record(
    scheduled_s: float = 0,
    tokens: tuple[float, ...] = (0.5, 0.6, 0.8),
    status: Status = "ok",
    output_tokens: int | None = None,
    sent_s: float | None = None,
    stage: str = "main",
) -> RequestRecord:
    return RequestRecord(
        repeat=0,
        stage=stage,
        index=0,
        turn=0,
        domain="",
        scheduled_s=scheduled_s,
        sent_s=scheduled_s if sent_s is None else sent_s,
        token_times=tuple(scheduled_s + token for token in tokens),
        done_s=scheduled_s + (tokens[-1] if tokens else 1) + 0.01,
        prompt_tokens=10,
        output_tokens=len(tokens) if output_tokens is None else output_tokens,
        status=status,
    )


def test_definitions_by_hand() -> None:
    one = record(scheduled_s=2, sent_s=2.25, output_tokens=5)
    assert metrics.ttft_s(one) == pytest.approx(0.5)
    assert metrics.e2e_s(one) == pytest.approx(0.8)
    assert metrics.tpot_s(one) == pytest.approx(0.3 / 4)
    assert metrics.itl_s(one) == pytest.approx([0.1, 0.2])
    assert one.lateness_s == pytest.approx(0.25)


def test_an_answer_of_one_token_has_no_tpot_but_meets_any() -> None:
    one = record(tokens=(0.5,))
    assert metrics.tpot_s(one) is None
    assert metrics.is_good(one, Objectives(tpot_ms=1))


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({}, True),
        ({"ttft_ms": 500}, True),
        ({"ttft_ms": 499}, False),
        ({"tpot_ms": 150.1}, True),
        ({"tpot_ms": 149.9}, False),
        ({"e2e_ms": 799}, False),
        ({"ttft_ms": 600, "tpot_ms": 200, "e2e_ms": 900}, True),
        ({"ttft_ms": 600, "tpot_ms": 100, "e2e_ms": 900}, False),
    ],
)
def test_a_good_request_meets_every_limit(limits: dict[str, float], good: bool) -> None:
    assert metrics.is_good(record(), Objectives(**limits)) is good


def test_errors_are_not_good_and_intended_ends_do_not_count() -> None:
    statuses: list[Status] = ["ok", "ok", "server_error", "timeout", "cancelled", "unfinished"]
    found = metrics.figures([record(status=status) for status in statuses], 10, NONE)
    assert (found.answered, found.errors, found.good, found.due) == (2, 2, 2, 4)
    assert found.good_share == 0.5
    assert (found.request_rate, found.goodput, found.output_rate) == (0.2, 0.2, 0.6)
    assert found.statuses == {"ok": 2, "server_error": 1, "timeout": 1, "cancelled": 1, "unfinished": 1}


def test_no_request_at_all() -> None:
    found = metrics.figures([], 10, NONE)
    assert found.distributions["ttft"] is None
    assert found.good_share == 1


def test_measured_leaves_out_warm_up_and_rates_count_the_tail() -> None:
    spans = (StageSpan("warm", 0, 5, False), StageSpan("main", 5, 10, True))
    records = [record(1, stage="warm"), record(9.5)]
    kept = metrics.measured(records, spans)
    assert kept == records[1:]
    assert metrics.measured_seconds(kept, spans) == pytest.approx(5.31)


def test_a_client_that_is_late_once_in_a_hundred_is_not_late_but_more_often_is() -> None:
    records = [record(index, sent_s=index + 0.001) for index in range(1000)]
    late = [dataclasses.replace(one, sent_s=one.scheduled_s + 0.5) for one in records[:20]]
    assert not metrics.is_late(records + late[:5], 20)
    assert metrics.is_late(records + late, 20)


@pytest.mark.vllm
def test_figures_are_those_of_vllm() -> None:
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import calculate_metrics

    generator = random.Random(0)
    records, outputs = [], []
    for number in range(300):
        gaps = [generator.expovariate(10) for _ in range(generator.choice([1, 2, 7, 30]))]
        ours = record(scheduled_s=0.1 * number, tokens=tuple(np.cumsum(gaps)))
        records.append(ours if number % 10 else dataclasses.replace(ours, status="server_error"))
        outputs.append(
            RequestFuncOutput(
                success=number % 10 != 0,
                latency=sum(gaps),
                output_tokens=len(gaps),
                ttft=gaps[0],
                itl=gaps[1:],
                prompt_len=10,
                start_time=ours.scheduled_s,
            )
        )
    theirs, _ = calculate_metrics([], outputs, 40.0, None, [50, 99, 99.9], {"ttft": 120, "tpot": 110, "e2el": 3000})
    limits = Objectives(ttft_ms=120, tpot_ms=110, e2e_ms=3000)
    mine = metrics.figures(records, 40.0, limits)
    assert 0 < mine.good < 270
    assert mine.goodput == pytest.approx(theirs.request_goodput)
    assert (mine.answered, mine.errors) == (theirs.completed, theirs.failed)
    assert (mine.request_rate, mine.output_rate) == pytest.approx((theirs.request_throughput, theirs.output_throughput))
    for name, prefix in {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": "e2el"}.items():
        found = mine.distributions[name]
        assert found is not None
        assert 1000 * found.mean == pytest.approx(getattr(theirs, f"mean_{prefix}_ms"))
        assert 1000 * found.std == pytest.approx(getattr(theirs, f"std_{prefix}_ms"))
        for percent, value in getattr(theirs, f"percentiles_{prefix}_ms"):
            assert 1000 * found.percentiles[float(percent)] == pytest.approx(value)
