"""When an answer is late: the estimator in both languages."""

from __future__ import annotations

import random

import pytest
from marks import native_core

from router_service.latency import CEILING_S, FLOOR_S, UNKNOWN_S, Latency


def test_nothing_known_waits_a_second() -> None:
    assert Latency().late_after_s(8) == UNKNOWN_S


def test_usual_answers_are_late_after_the_floor() -> None:
    latency = Latency()
    for _ in range(50):
        latency.note(8, 0.002)
    assert latency.late_after_s(8) == FLOOR_S


def test_slow_replicas_get_more_time_and_unsteady_ones_still_more() -> None:
    steady, unsteady = Latency(), Latency()
    for turn in range(200):
        steady.note(8, 0.3)
        unsteady.note(8, 0.1 if turn % 2 else 0.5)
    assert steady.late_after_s(8) == pytest.approx(0.6, rel=0.01)
    assert unsteady.late_after_s(8) > 2 * steady.late_after_s(8)


def test_more_rows_get_more_time_within_the_ceiling() -> None:
    latency = Latency()
    for _ in range(50):
        latency.note(1, 0.1)
    waits = [latency.late_after_s(rows) for rows in (1, 2, 64, 8192)]
    assert waits == sorted(waits) and waits[1] == pytest.approx(2 * waits[0]) and waits[-1] == CEILING_S
    assert latency.late_after_s(10**9) == CEILING_S


def test_fewer_rows_than_ever_seen_get_the_time_of_more() -> None:
    latency = Latency()
    for _ in range(50):
        latency.note(64, 0.2)
    assert latency.late_after_s(1) == latency.late_after_s(64)


def test_the_native_estimator_gives_the_same() -> None:
    native = native_core().Latency()
    latency, chance = Latency(), random.Random(3)
    for _ in range(500):
        rows, taken_ns = chance.choice((1, 3, 16, 900)), int(chance.expovariate(1 / 5e7))
        native.note(rows, taken_ns)
        latency.note(rows, taken_ns * 1e-9)
    for rows in (1, 2, 5, 16, 100, 4096, 2**21):
        assert native.late_after(rows) * 1e-9 == pytest.approx(latency.late_after_s(rows), rel=1e-6)
