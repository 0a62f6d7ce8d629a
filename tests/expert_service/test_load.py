from __future__ import annotations

import math

import numpy
import pytest
from marks import needs_native

from expert_service.load import LoadMeter, QueueWaits


def test_busy_is_the_share_of_the_last_second_or_so() -> None:
    meter = LoadMeter({0: 2}, now=0)
    assert meter.busy(5) == 0
    now = 5.0
    for _ in range(4000):
        meter.begin(now)
        meter.end(now + 0.00025, 0, 1, numpy.array([0], numpy.int32))
        now += 0.001
    assert meter.busy(now) == pytest.approx(0.25, abs=0.01)
    assert meter.rows_per_s(now) == pytest.approx(1000, rel=0.03)
    assert meter.busy(now + 10) < 0.001 and meter.rows_per_s(now + 10) < 1


def test_a_batch_that_still_runs_counts() -> None:
    meter = LoadMeter({0: 2}, now=0)
    meter.begin(1)
    assert meter.busy(1) == 0
    assert meter.busy(2) == pytest.approx(1 - math.exp(-1))
    assert meter.busy(20) == pytest.approx(1)


def test_rows_are_counted_per_expert() -> None:
    meter = LoadMeter({2: 3, 5: 4}, now=0)
    meter.end(1, 2, 3, numpy.array([2, 0, 2], numpy.int32))
    meter.end(2, 5, 2, numpy.array([3], numpy.int32))
    meter.end(3, 2, 1, numpy.array([1], numpy.int32))
    assert meter.expert_rows() == {2: [1, 1, 2], 5: [0, 0, 0, 1]}
    assert meter.rows_total == 6


def test_queue_waits_are_exact_to_a_sixteenth() -> None:
    random = numpy.random.default_rng(0)
    waits_us = numpy.exp(random.uniform(0, numpy.log(3e9), 2000)).astype(numpy.int64)
    waits = QueueWaits(now=0)
    for number, wait_us in enumerate(waits_us.tolist()):
        waits.took(10 + number * 0.002, [wait_us * 1e-6])
    ordered = numpy.sort(waits_us)
    for found, true in zip(waits.quantiles(14, None), (ordered[999], ordered[1899]), strict=True):
        assert abs(found - true) <= true / 16


def test_queue_waits_of_the_last_seconds_count() -> None:
    waits = QueueWaits(now=0)
    assert waits.quantiles(0, None) == (0, 0)
    waits.took(1.9, [0.000_009] * 3)
    waits.took(2.1, [0.000_001] * 7)
    assert waits.quantiles(2.1, None) == waits.quantiles(6.9, None) == (1, 9)
    assert waits.quantiles(7.0, None) == (1, 1)
    assert waits.quantiles(8.0, None) == (0, 0)
    waits.took(100.0, [0.000_005])
    assert waits.quantiles(100.0, None) == (5, 5)


def test_where_nothing_is_taken_the_oldest_counts() -> None:
    """An executor that hangs does not look idle."""
    waits = QueueWaits(now=0)
    waits.took(10, [0.000_005] * 1000)
    assert waits.quantiles(10.9, 10.0) == (5, 5)
    assert waits.quantiles(13, 10.0) == (3_000_000, 3_000_000)
    assert waits.quantiles(13, 12.5) == (5, 5), "nothing was there to be taken"
    waits.took(14, [4.0])
    assert waits.quantiles(14.5, 13.9) == (5, 5)
    assert waits.quantiles(10**6, 0.0)[1] == 2**32 - 1


@needs_native
def test_the_native_meter_gives_the_same_numbers() -> None:
    import expertmesh_native

    random = numpy.random.default_rng(1)
    ours = LoadMeter({3: 8}, now=0)
    native = expertmesh_native.LoadMeter({3: 8}, 0)
    now_us = 1_000_000
    for _ in range(500):
        now_us += int(random.exponential(40_000))
        waits_us = [int(wait) for wait in random.exponential(10.0 ** random.integers(0, 7), random.integers(0, 4))]
        ours.waits.took(now_us / 1e6, [wait / 1e6 for wait in waits_us])
        native.record(1000 * now_us, 3, [1000 * (now_us - wait) for wait in waits_us], [1, 2], 2)
        asked_us = now_us + int(random.exponential(2_000_000))
        oldest_us = max(0, asked_us - int(random.exponential(2_000_000))) if random.integers(2) else None
        wanted = ours.waits.quantiles(asked_us / 1e6, None if oldest_us is None else oldest_us / 1e6)
        assert native.queue_wait(1000 * asked_us, -1 if oldest_us is None else 1000 * oldest_us) == wanted
