"""Tokens per second and the popularity of experts over a day; pure functions of the scenario and its seed."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

from expertmesh.simulation.scenario import Scenario, ShapeSection, TrafficSection
from loadtest.config import Skew
from loadtest.skew import inclusion, rank_popularity

DAY_S = 86400.0
TOKENS, RANKS = 0x70, 0x71
"""Keep the random numbers of both apart."""
Floats = NDArray[numpy.float64]


class Traffic:
    """The same for every strategy of a run, whatever it does."""

    def __init__(self, scenario: Scenario) -> None:
        self._tick_s = scenario.policy.tick_s
        self._popularity = scenario.traffic.popularity
        self._ranks = _RankOrders(scenario)
        self.tokens_per_s = tokens_per_s(scenario.traffic, scenario.ticks, self._tick_s, scenario.seed)
        """[ticks]"""

    def chances(self, tick: int) -> Floats:
        """[L * E] chances that a row chooses an expert; those of a layer sum to `top_k`."""
        every_s = self._popularity.switch_every_s
        if every_s is None:
            return self._ranks.chances(0)
        at_s = tick * self._tick_s
        switch = int(at_s // every_s)
        since_s = at_s - switch * every_s
        now = self._ranks.chances(switch)
        if not switch or since_s >= self._popularity.fade_s:
            return now
        share = since_s / self._popularity.fade_s
        return (1 - share) * self._ranks.chances(switch - 1) + share * now


def tokens_per_s(traffic: TrafficSection, ticks: int, tick_s: float, seed: int) -> Floats:
    """[ticks]: a cosine over the day, times bursts, times gamma noise of mean 1."""
    generator = numpy.random.default_rng((seed, TOKENS))
    at_s = (numpy.arange(ticks) + 0.5) * tick_s
    wave = (1 + numpy.cos(2 * numpy.pi * (at_s - traffic.peak_at_h * 3600) / DAY_S)) / 2
    tokens = traffic.peak_tokens_per_s * (traffic.trough_share + (1 - traffic.trough_share) * wave)
    if traffic.bursts is not None:
        count = generator.poisson(traffic.bursts.per_day * ticks * tick_s / DAY_S)
        begins = generator.uniform(0, ticks * tick_s, (count, 1))
        burst = ((at_s >= begins) & (at_s < begins + traffic.bursts.duration_s)).any(axis=0)
        tokens = tokens * numpy.where(burst, traffic.bursts.factor, 1.0)
    if traffic.noise:
        shape = traffic.noise**-2
        tokens = tokens * generator.gamma(shape, 1 / shape, ticks)
    return numpy.asarray(tokens)


class _RankOrders:
    """The chances after the n-th switch. Keeps the last two; an earlier one begins again at the first."""

    def __init__(self, scenario: Scenario) -> None:
        shape: ShapeSection = scenario.model
        popularity = scenario.traffic.popularity
        self._shape, self._share, self._seed = shape, popularity.switch_share, scenario.seed
        by_rank = rank_popularity(Skew(kind="zipf", exponent=popularity.exponent), shape.experts)
        self._by_rank = inclusion(by_rank, shape.top_k)
        self._begin()

    def chances(self, switch: int) -> Floats:
        if switch < self._switches - 1:
            self._begin()
        while self._switches < switch:
            self._switch()
        return self._last if switch == self._switches else self._before

    def _begin(self) -> None:
        self._generator = numpy.random.default_rng((self._seed, RANKS))
        layers, experts = self._shape.layers, self._shape.experts
        self._ranks = numpy.stack([self._generator.permutation(experts) for _ in range(layers)])
        self._switches = 0
        self._last = self._before = self._by_rank[self._ranks].ravel()

    def _switch(self) -> None:
        layers, experts = self._ranks.shape
        moving = min(max(2, round(self._share * experts)), experts) if self._share else 0
        for layer in range(layers):
            who = self._generator.choice(experts, moving, replace=False)
            self._ranks[layer, who] = self._ranks[layer, self._generator.permutation(who)]
        self._switches += 1
        self._before, self._last = self._last, self._by_rank[self._ranks].ravel()
