"""When sessions arrive: a renewal process in its own time, stretched so that the rate follows the stage's curve."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expertmesh.errors import ConfigError
from loadtest.config import ConstantArrivals, GammaArrivals, OpenArrivals, PoissonArrivals

Floats = npt.NDArray[np.float64]
MAX_ARRIVALS = 20_000_000
GRID_POINTS = 20_000
POINTS_PER_WAVE = 200


def arrival_times(arrivals: OpenArrivals, duration_s: float, generator: np.random.Generator) -> Floats:
    """[N] ascending, seconds from the stage's start, below duration_s.

    In operational time, where one session is expected per unit, the gaps have mean 1: exponential (Poisson), gamma of
    shape `burstiness` or constant. The inverse of the integrated rate turns that into seconds.
    """
    seconds, expected = _integrated_rate(arrivals, duration_s)
    total = float(expected[-1])
    if total > MAX_ARRIVALS:
        raise ConfigError(f"stages: {total:.0f} arrivals in one stage; at most {MAX_ARRIVALS} are possible")
    return np.interp(_operational_times(arrivals, total, generator), expected, seconds)


def rate_at(arrivals: OpenArrivals, at_s: Floats, duration_s: float) -> Floats:
    """Sessions per second at `at_s`, seconds from the stage's start."""
    end = arrivals.rate if arrivals.to_rate is None else arrivals.to_rate
    rate = arrivals.rate + (end - arrivals.rate) * at_s / duration_s
    if arrivals.wave is None:
        return rate
    turn = at_s / arrivals.wave.period_s + arrivals.wave.phase
    return rate * (1 + arrivals.wave.amplitude * np.sin(2 * np.pi * turn))


def _operational_times(arrivals: OpenArrivals, total: float, generator: np.random.Generator) -> Floats:
    if isinstance(arrivals, ConstantArrivals):
        return np.arange(0, np.ceil(total - 1e-9))
    times = np.array([0.0])
    while times[-1] < total:
        wanted = int(1.1 * (total - times[-1])) + 100
        times = np.concatenate([times, times[-1] + np.cumsum(_gaps(arrivals, wanted, generator))])
    return times[(times > 0) & (times < total)]


def _gaps(arrivals: OpenArrivals, count: int, generator: np.random.Generator) -> Floats:
    """[count], mean 1."""
    if isinstance(arrivals, GammaArrivals):
        return generator.gamma(arrivals.burstiness, 1 / arrivals.burstiness, count)
    assert isinstance(arrivals, PoissonArrivals)
    return generator.standard_exponential(count)


def _integrated_rate(arrivals: OpenArrivals, duration_s: float) -> tuple[Floats, Floats]:
    """A grid of seconds and the sessions expected until each, by the trapezoidal rule."""
    if arrivals.wave is None and arrivals.to_rate is None:
        return np.array([0.0, duration_s]), np.array([0.0, arrivals.rate * duration_s])
    waves = 0.0 if arrivals.wave is None else duration_s / arrivals.wave.period_s
    points = max(GRID_POINTS, min(int(POINTS_PER_WAVE * waves), 100 * GRID_POINTS))
    seconds = np.linspace(0, duration_s, points + 1)
    rates = rate_at(arrivals, seconds, duration_s)
    steps = np.diff(seconds) * (rates[1:] + rates[:-1]) / 2
    return seconds, np.concatenate([[0.0], np.cumsum(steps)])
