"""What summary.json says of a run, against the run's own numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy
import pytest
from made_runs import SPANS, made_config, made_run

from loadtest import timeline
from loadtest.metrics import ttft_s
from loadtest.records import ExpertRows, FaultRecord, Sample
from loadtest.summary import summarize


def test_figures_are_the_mean_of_the_repeats() -> None:
    run = made_run(3)
    figures = summarize(run, made_config())["figures"]
    counted = [one for one in run.records if one.stage != "warm-up" and one.status == "ok"]
    medians = [numpy.median([ttft_s(one) for one in counted if one.repeat == repeat]) * 1000 for repeat in range(3)]
    found = figures["ttft_ms.p50"]
    assert found["per_repeat"] == pytest.approx(medians)
    assert found["value"] == pytest.approx(numpy.mean(medians))
    assert found["low"] < found["value"] < found["high"]
    assert {"itl_ms.p99.9", "tpot_ms.p95", "e2e_ms.max", "goodput", "output_rate", "error_share"} <= figures.keys()


def test_one_repeat_has_no_bounds() -> None:
    figures = summarize(made_run(1), made_config(repeats=1))["figures"]
    assert {(one["low"], one["high"]) for one in figures.values()} == {(None, None)}


def test_no_request_is_dropped_from_the_counts() -> None:
    run = made_run(2)
    found = summarize(run, made_config())
    assert found["requests"]["scheduled"] == len(run.records)
    assert sum(found["requests"]["by_status"].values()) == found["requests"]["measured"]
    failed = sum(one.status == "server_error" and one.stage != "warm-up" for one in run.records)
    assert failed > 0
    assert found["errors"] == [{"status": "server_error", "message": "HTTP 500: <b>no & luck</b>", "count": failed}]


def test_many_different_errors_are_counted_together() -> None:
    run = made_run(1)
    records = tuple(
        replace(one, status="server_error", token_times=(), error=f"number {one.index}") for one in run.records
    )
    errors = summarize(replace(run, records=records), made_config())["errors"]
    assert len(errors) == 21 and errors[-1]["message"] == "other messages"
    assert sum(one["count"] for one in errors) == sum(one.stage != "warm-up" for one in records)


def test_a_run_in_which_nothing_was_answered_has_a_summary() -> None:
    run = made_run(2)
    records = tuple(replace(one, status="refused", token_times=(), error="no") for one in run.records)
    found = summarize(replace(run, records=records), made_config())
    assert found["figures"]["error_share"]["value"] == 1.0
    assert not [name for name in found["figures"] if "_ms" in name]
    assert found["objectives"]["met"] is False
    json.dumps(found, allow_nan=False)


def test_a_run_that_was_interrupted_before_a_request() -> None:
    run = replace(made_run(1), records=(), samples=(), faults=(), skew=(), interrupted=True)
    found = summarize(run, made_config())
    assert found["interrupted"] and found["requests"]["scheduled"] == 0
    json.dumps(found, allow_nan=False)


def test_a_late_client_makes_the_run_invalid() -> None:
    run = made_run(1)
    late = tuple(replace(one, sent_s=one.scheduled_s + 0.03) for one in run.records)
    assert summarize(run, made_config())["valid"]
    found = summarize(replace(run, records=late), made_config())
    assert not found["valid"]
    assert found["client"]["lateness_ms_p99"] == pytest.approx(30)


def test_stages_and_domains_are_told_apart() -> None:
    run = made_run(1)
    found = summarize(run, made_config())
    assert list(found["stages"]) == [span.name for span in SPANS]
    assert [stage["measured"] for stage in found["stages"].values()] == [False, True, True]
    assert sum(one["requests"] for one in found["domains"].values()) == found["requests"]["measured"]


def test_skew_of_each_layer() -> None:
    skew = [ExpertRows(2, 0, 10), ExpertRows(2, 1, 30), ExpertRows(5, 0, 5), ExpertRows(5, 1, 5)]
    found = summarize(replace(made_run(1), skew=tuple(skew)), made_config())["experts"]
    assert found["2"] == {"rows": 40, "balancedness": pytest.approx(2 / 3), "hottest": 1, "hottest_share": 0.75}
    assert found["5"]["balancedness"] == 1.0
    idle = tuple(replace(one, rows=0) for one in skew)
    assert summarize(replace(made_run(1), skew=idle), made_config())["experts"] is None


def test_what_a_fault_cost() -> None:
    run = made_run(1)
    slow = min((one for one in run.records if one.scheduled_s > 9), key=lambda one: one.scheduled_s)
    hit = replace(slow, token_times=(slow.scheduled_s + 2.0, slow.scheduled_s + 3.5), done_s=slow.scheduled_s + 3.5)
    records = tuple(hit if one is slow else one for one in run.records)
    faults = (FaultRecord(0, 9.0, "hang", "a-1", 10.0), FaultRecord(0, 0.0, "kill", "a-1", None, "it has gone"))
    during, before = summarize(replace(run, records=records, faults=faults), made_config())["faults"]
    assert during["slowest_first_token_ms"] == pytest.approx(2000)
    assert during["longest_gap_ms"] == pytest.approx(1500)
    touched = [one for one in records if one.scheduled_s <= 20.0 and one.done_s >= 9.0]
    assert during["requests"] == len(touched)
    assert during["failed"] == sum(one.status == "server_error" for one in touched)
    assert before["error"] == "it has gone"


def test_groups() -> None:
    found = summarize(made_run(2), made_config())["groups"]
    assert found["a"]["replicas_min"] == 1 and found["a"]["replicas_max"] == 2
    assert found["a"]["queued_rows_max"] == 7 * 19 and found["b"]["queued_rows_max"] == 0


def test_rates_over_time_add_up() -> None:
    run = made_run(2)
    rows = timeline.rates(run)
    width = timeline.bin_width_s(20)
    for what, status in (("answered", "ok"), ("failed", "server_error")):
        total = sum(row["value"] for row in rows if row["what"] == what and row["repeat"] == 1) * width
        assert total == pytest.approx(sum(one.status == status for one in run.records if one.repeat == 1), abs=0.1)


def test_open_requests_over_time() -> None:
    run = made_run(1)
    for row in timeline.open_requests(run):
        waiting = sum(
            one.scheduled_s <= row["at_s"] < (one.token_times[0] if one.token_times else one.done_s)
            for one in run.records
        )
        answering = sum(bool(one.token_times) and one.token_times[0] <= row["at_s"] < one.done_s for one in run.records)
        assert row["value"] == (answering if row["what"] == "answering" else waiting)


def test_counters_become_rates() -> None:
    samples = [Sample(0, at_s, "n", "h", value) for at_s, value in ((0.0, 10.0), (2.0, 30.0), (4.0, 6.0))]
    assert [row["value"] for row in timeline.per_second(samples, "n")] == [10.0, 3.0]


def test_points_are_bounded_and_keep_failures() -> None:
    run = made_run(1)
    many = tuple(replace(one, index=number) for number, one in enumerate(run.records * 40))
    rows = timeline.latencies(replace(run, records=many), made_config())
    failed = sum(one.status != "ok" for one in many)
    assert len(rows) <= timeline.MAX_POINTS
    assert sum(row["status"] != "ok" for row in rows) == min(failed, timeline.MAX_POINTS // 2)
