"""Intervals against textbook values."""

from __future__ import annotations

import numpy
import pytest

from loadtest.confidence import difference, estimate


def test_one_repeat_has_no_interval() -> None:
    found = estimate([4.0])
    assert (found.value, found.low, found.high) == (4.0, None, None)


def test_interval_is_students() -> None:
    found = estimate([9.0, 10.0, 11.0])
    half = 4.302653 * 1.0 / 3**0.5
    assert (found.low, found.high) == pytest.approx((10 - half, 10 + half))


def test_equal_repeats_are_certain() -> None:
    found = estimate([3.0, 3.0, 3.0])
    assert (found.low, found.high) == (3.0, 3.0)


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    generator = numpy.random.default_rng(5)
    found = [estimate(generator.normal(10, 2, 4).tolist()) for _ in range(2000)]
    held = numpy.mean([one.low is not None and one.high is not None and one.low <= 10 <= one.high for one in found])
    assert held == pytest.approx(0.95, abs=0.02)


def test_difference_is_certain_where_it_is_large() -> None:
    assert difference([10, 10.1, 9.9], [12, 12.1, 11.9]).certain
    assert difference([10, 12, 8], [10.5, 12.5, 8.5]).certain is False
    assert difference([10, 10.1], [12.0]).certain is None
    assert difference([1.0, 1.0], [1.0, 1.0]).certain is False
    assert difference([1.0, 1.0], [2.0, 2.0]).certain
