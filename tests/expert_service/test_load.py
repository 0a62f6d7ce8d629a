from __future__ import annotations

import math

import numpy
import pytest

from expert_service.load import LoadMeter


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
