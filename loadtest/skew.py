"""Which experts the rows of synthetic dispatches go to: popularity per layer, correlation, and its change over time.

A row's K experts are drawn by systematic sampling (Madow 1949) over a random order of the experts, which gives every
expert exactly its share of the choices; an expert whose share would be more than one choice per row gets every row, and
the others what that leaves.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy
from numpy.typing import NDArray

from expertmesh.errors import ConfigError
from loadtest.config import CorrelatedPairs, Skew

STREAM = 0x5E
"""Keeps the random numbers drawn here apart from those that the same seed gives to others."""
Floats = NDArray[numpy.float64]
Indices = NDArray[numpy.int64]


class ExpertSampler:
    """Draws experts. `experts_per_layer`: MoE layer -> number of experts. Same seeds, same rows."""

    def __init__(self, skew: Skew, experts_per_layer: Mapping[int, int], top_k: int, seed: int) -> None:
        """Raises ConfigError where a layer has too few experts for the skew or for `top_k`."""
        for layer, experts in experts_per_layer.items():
            _check(skew, layer, experts, top_k)
        self._skew = skew
        self._top_k = top_k
        self._start = {
            layer: _popularity(skew, experts, layer, seed) for layer, experts in sorted(experts_per_layer.items())
        }

    def popularity(self, layer: int, at_s: float) -> Floats:
        """[E] shares of the choices that are asked for, `at_s` seconds after the start; they sum to 1."""
        by = sum(shift.by for shift in self._skew.shifts if shift.at_s <= at_s)
        return numpy.roll(self._start[layer], by)

    def draw(self, layer: int, at_s: float, rows: int, seed: int) -> NDArray[numpy.int32]:
        """[R, K] different experts per row."""
        generator = numpy.random.default_rng((seed, STREAM))
        chances = inclusion(self.popularity(layer, at_s), self._top_k)
        order = generator.random((rows, len(chances))).argsort(axis=1)
        reached = chances[order].cumsum(axis=1)
        marks = generator.random((rows, 1)) + numpy.arange(self._top_k)
        places = (reached[:, None, :] <= marks[:, :, None]).sum(axis=2).clip(max=len(chances) - 1)
        chosen = numpy.take_along_axis(order, places, axis=1)
        if self._skew.correlated is not None:
            correlate(chosen, self._skew.correlated, generator)
        return chosen.astype(numpy.int32)


def inclusion(popularity: Floats, top_k: int) -> Floats:
    """[E] chances to be among a row's `top_k`: proportional to popularity, at most 1; they sum to `top_k`."""
    chances = numpy.zeros_like(popularity)
    full = numpy.zeros(len(popularity), dtype=bool)
    while True:
        shares = popularity[~full] if popularity[~full].any() else numpy.ones((~full).sum())
        chances[~full] = (top_k - full.sum()) * shares / max(shares.sum(), 1e-300)
        beyond = chances > 1
        if not beyond.any():
            return chances
        full |= beyond
        chances[full] = 1.0


def correlate(chosen: Indices, correlated: CorrelatedPairs, generator: numpy.random.Generator) -> None:
    """Brings the second of each pair into the rows of `chosen` [R, K] that hold the first, in place of another expert;
    of one that is in no pair, where the row has such a one."""
    paired = numpy.array(correlated.pairs).ravel()
    for first, second in correlated.pairs:
        holds = (chosen == first).any(axis=1) & ~(chosen == second).any(axis=1)
        rows = numpy.flatnonzero(holds & (generator.random(len(chosen)) < correlated.probability))
        costs = numpy.isin(chosen[rows], paired).astype(int) + 2 * (chosen[rows] == first)
        chosen[rows, costs.argmin(axis=1)] = second


def rank_popularity(skew: Skew, experts: int) -> Floats:
    """[E], most popular first; sums to 1."""
    if skew.kind == "zipf":
        weights = numpy.arange(1, experts + 1, dtype=numpy.float64) ** -skew.exponent
        return numpy.asarray(weights / weights.sum())
    if skew.kind == "hot_set":
        hot, cold = skew.hot_experts, experts - skew.hot_experts
        return numpy.repeat([skew.hot_share / hot, (1 - skew.hot_share) / cold], [hot, cold])
    return numpy.full(experts, 1 / experts)


def balancedness(loads: Floats) -> float:
    """Mean over largest, 0 to 1; 1 where nothing was computed."""
    largest = float(loads.max(initial=0.0))
    return float(loads.mean()) / largest if largest else 1.0


def _popularity(skew: Skew, experts: int, layer: int, seed: int) -> Floats:
    by_rank = rank_popularity(skew, experts)
    if not skew.permute_layers:
        return by_rank
    return numpy.random.default_rng((seed, STREAM, layer)).permutation(by_rank)


def _check(skew: Skew, layer: int, experts: int, top_k: int) -> None:
    if top_k > experts:
        raise ConfigError(f"expert_load.top_k: {top_k} experts per row, but layer {layer} has {experts}")
    if skew.kind == "hot_set" and skew.hot_experts >= experts:
        raise ConfigError(f"expert_load.skew.hot_experts: {skew.hot_experts} are hot, but layer {layer} has {experts}")
    if skew.correlated is None:
        return
    if top_k < 2:
        raise ConfigError("expert_load.skew.correlated: pairs need a top_k of 2 or more")
    for pair in skew.correlated.pairs:
        if len(set(pair)) < 2 or not all(0 <= one < experts for one in pair):
            raise ConfigError(f"expert_load.skew.correlated: layer {layer} with {experts} experts has no pair {pair}")
