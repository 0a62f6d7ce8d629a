"""Queueing tables of many groups at once: looked up as arrays, each made when it is first needed."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

from expertmesh.simulation.queueing import LOADS, MAX_REPLICAS, PER_SERVICE, Table, table

Floats = NDArray[numpy.float64]
Indices = NDArray[numpy.int64]
Located = tuple[Indices, Indices, Floats]


class Tables:
    """Side by side, so that all groups are looked up at once."""

    def __init__(self) -> None:
        self._place: dict[tuple[int, int], int] = {}
        self._columns: dict[str, Floats] = {}
        self._slots = numpy.full((0, MAX_REPLICAS + 1), -1, dtype=numpy.int64)

    @property
    def beyond(self) -> Floats:
        """[tables, X, Y]"""
        return self._columns["beyond"]

    def locate(self, layers: Indices, replicas: Floats, x: Floats) -> Located:
        """Of each group its table, the place in it below its load, and the weight of the place above."""
        count = numpy.minimum(replicas, MAX_REPLICAS).astype(numpy.int64)
        if layers.max() >= len(self._slots):
            grown = numpy.full((int(layers.max()) + 1, MAX_REPLICAS + 1), -1, dtype=numpy.int64)
            grown[: len(self._slots)] = self._slots
            self._slots = grown
        slots = self._slots[layers, count]
        if (slots < 0).any():
            self._add(sorted(set(zip(layers.tolist(), count.tolist(), strict=True)) - self._place.keys()))
            slots = self._slots[layers, count]
        low = numpy.clip(numpy.searchsorted(LOADS, x) - 1, 0, len(LOADS) - 2)
        return slots, low, numpy.clip((x - LOADS[low]) / (LOADS[low + 1] - LOADS[low]), 0.0, 1.0)

    def mix(self, name: str, at: Located) -> Floats:
        slots, low, weight = at
        column = self._columns[name]
        below = column[slots, low]
        return below + (column[slots, low + 1] - below) * weight

    def _add(self, wanted: list[tuple[int, int]]) -> None:
        for layers, replicas in wanted:
            self._slots[layers, replicas] = self._place[layers, replicas] = len(self._place)
        made = [table(layers, replicas) for layers, replicas in self._place]
        knots = max(one.beyond.shape[1] for one in made)
        self._columns = {
            "busy": numpy.stack([one.busy for one in made]),
            "mean_wait": numpy.stack([one.mean_wait for one in made]),
            "p95_wait": numpy.stack([_quantile(one, 0.05) for one in made]),
            "beyond": numpy.stack([numpy.pad(one.beyond, ((0, 0), (0, knots - one.beyond.shape[1]))) for one in made]),
        }


def _quantile(found: Table, later: float) -> Floats:
    """[X] service times that this share of the messages waits longer than."""
    knots = found.beyond.shape[1]
    first = numpy.where((found.beyond <= later).any(axis=1), (found.beyond <= later).argmax(axis=1), knots - 1)
    rows = numpy.arange(len(first))
    above, below = found.beyond[rows, numpy.maximum(first - 1, 0)], found.beyond[rows, first]
    part = numpy.clip((above - later) / numpy.maximum(above - below, 1e-12), 0, 1)
    return numpy.where(first == 0, 0.0, (first - 1 + part) / PER_SERVICE)
