"""The formulas against replicas that are simulated message by message."""

from __future__ import annotations

import numpy
import pytest
from simulation.reference import serve

from expertmesh.simulation.queueing import LOADS, PER_SERVICE, table


def at(column: numpy.typing.NDArray[numpy.float64], x: float) -> float:
    return float(numpy.interp(x, LOADS, column))


@pytest.mark.parametrize("layers", [1, 2, 8])
@pytest.mark.parametrize("x", [0.3, 0.7, 1.5])
def test_one_replica_is_exact(layers: int, x: float) -> None:
    seen, found = serve(x, layers, 1, lambda _: 1.0, 40_000, seed=1), table(layers, 1)
    assert at(found.busy, x) == pytest.approx(seen.busy, rel=0.015)
    assert at(found.mean_wait, x) == pytest.approx(numpy.mean(seen.waits_s), rel=0.04, abs=0.01)
    for wait in (0.5, 1.0, 2.0):
        later = at(found.beyond[:, min(round(wait * PER_SERVICE), found.beyond.shape[1] - 1)], x)
        assert later == pytest.approx(numpy.mean(numpy.array(seen.waits_s) > wait), abs=0.02)


@pytest.mark.parametrize(("layers", "replicas"), [(1, 2), (8, 2), (1, 8), (4, 8)])
@pytest.mark.parametrize("x", [0.3, 0.85, 1.5])
def test_several_replicas_are_close(replicas: int, layers: int, x: float) -> None:
    seen, found = serve(x * replicas, layers, replicas, lambda _: 1.0, 20_000, seed=2), table(layers, replicas)
    assert at(found.busy, x) == pytest.approx(seen.busy, rel=0.06)
    assert at(found.mean_wait, x) == pytest.approx(numpy.mean(seen.waits_s), rel=0.15, abs=0.1)


@pytest.mark.parametrize(("layers", "replicas"), [(1, 1), (2, 1), (30, 1), (1, 3), (2, 8), (2, 40), (58, 96)])
def test_tables_are_distributions(layers: int, replicas: int) -> None:
    found = table(layers, replicas)
    assert ((found.busy >= 0) & (found.busy <= 1 + 1e-9)).all()
    assert (numpy.diff(found.busy) >= -2e-3).all(), "more load, busier"
    assert ((found.beyond >= -1e-9) & (found.beyond <= 1 + 1e-9)).all()
    assert (numpy.diff(found.beyond, axis=1) <= 1e-9).all()
    assert (found.busy <= LOADS + 1e-9).all(), "nothing is computed that did not come"


def test_larger_batches_that_take_longer() -> None:
    """The fixed point of batch and service time, as `service` finds it, against messages."""

    def service_s(messages: float) -> float:
        return 0.6 + 0.4 * messages

    rate, layers, batch = 1.1, 2, 1.0
    for _ in range(200):
        x = rate * service_s(batch)
        batch = (batch + x / at(table(layers, 1).busy, x)) / 2
    seen = serve(rate, layers, 1, service_s, 40_000, seed=3)
    assert batch == pytest.approx(seen.batch_messages, rel=0.05)
    assert at(table(layers, 1).busy, x) == pytest.approx(seen.busy, rel=0.03)
