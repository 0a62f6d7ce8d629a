"""Arrivals have the distribution that was asked for, by Kolmogorov-Smirnov tests, and come again with their seed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from expertmesh.errors import ConfigError
from loadtest.arrivals import arrival_times, rate_at
from loadtest.config import ConstantArrivals, GammaArrivals, OpenArrivals, PoissonArrivals, Wave

WAVE = Wave(amplitude=0.8, period_s=100, phase=0.1)
CURVES = {
    "flat": {},
    "ramp": {"to_rate": 60},
    "down": {"rate": 40, "to_rate": 1},
    "wave": {"wave": WAVE},
    "ramp and wave": {"to_rate": 60, "wave": WAVE},
}
DURATION_S = 400.0


def made(arrivals: OpenArrivals, seed: int = 1, duration_s: float = DURATION_S) -> np.ndarray:
    return arrival_times(arrivals, duration_s, np.random.default_rng(seed))


def expected_until(arrivals: OpenArrivals, times: np.ndarray, duration_s: float = DURATION_S) -> np.ndarray:
    """Integral of the rate, by a rule and a grid that the code under test does not use."""
    fine = np.linspace(0, duration_s, 400_001)
    middle = (fine[1:] + fine[:-1]) / 2
    total = np.concatenate([[0], np.cumsum(rate_at(arrivals, middle, duration_s) * np.diff(fine))])
    return np.interp(times, fine, total)


@pytest.mark.parametrize("curve", CURVES)
def test_poisson_gaps_are_exponential_once_the_rate_is_taken_out(curve: str) -> None:
    arrivals = PoissonArrivals(kind="poisson", **{"rate": 20, **CURVES[curve]})
    gaps = np.diff(expected_until(arrivals, made(arrivals)))
    assert len(gaps) > 4000
    assert stats.kstest(gaps, "expon").pvalue > 0.01


@pytest.mark.parametrize("curve", ["ramp", "down", "wave"])
def test_the_test_would_notice_a_rate_that_is_ignored(curve: str) -> None:
    arrivals = PoissonArrivals(kind="poisson", **{"rate": 20, **CURVES[curve]})
    gaps = np.diff(made(arrivals))
    assert stats.kstest(gaps / gaps.mean(), "expon").pvalue < 1e-4


@pytest.mark.parametrize("burstiness", [0.25, 4])
def test_gamma_gaps_have_the_shape_asked_for(burstiness: float) -> None:
    gaps = np.diff(made(GammaArrivals(kind="gamma", rate=20, burstiness=burstiness)))
    assert stats.kstest(gaps * 20, "gamma", args=(burstiness, 0, 1 / burstiness)).pvalue > 0.01
    assert stats.kstest(gaps * 20, "expon").pvalue < 1e-6


def test_constant_arrivals_are_evenly_spaced_and_none_is_at_the_end() -> None:
    times = made(ConstantArrivals(kind="constant", rate=4), duration_s=10)
    assert times == pytest.approx(np.arange(40) / 4)


def test_a_ramp_of_constant_arrivals_has_the_mean_rate() -> None:
    times = made(ConstantArrivals(kind="constant", rate=10, to_rate=30), duration_s=10)
    assert len(times) == 200
    assert 1 / np.diff(times)[[0, -1]] == pytest.approx([10, 30], rel=0.03)


@pytest.mark.parametrize("curve", CURVES)
def test_counts_agree_with_the_rate_and_times_ascend_within_the_stage(curve: str) -> None:
    arrivals = PoissonArrivals(kind="poisson", **{"rate": 20, **CURVES[curve]})
    times = made(arrivals, seed=7)
    expected = expected_until(arrivals, np.array([DURATION_S]))[0]
    assert abs(len(times) - expected) < 4 * expected**0.5
    assert (np.diff(times) >= 0).all() and times[0] >= 0 and times[-1] < DURATION_S


def test_same_seed_same_times() -> None:
    arrivals = PoissonArrivals(kind="poisson", rate=20)
    assert (made(arrivals, seed=3) == made(arrivals, seed=3)).all()
    assert len(np.intersect1d(made(arrivals, seed=3), made(arrivals, seed=4))) == 0


def test_more_arrivals_than_memory_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match="100000000 arrivals in one stage"):
        made(PoissonArrivals(kind="poisson", rate=1e6), duration_s=100)
