"""Popularity as configured is popularity as drawn."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from expertmesh.errors import ConfigError
from loadtest.config import Skew
from loadtest.skew import ExpertSampler, balancedness

EXPERTS = {0: 16, 3: 16}


def sampler(top_k: int = 4, seed: int = 1, **skew: Any) -> ExpertSampler:
    return ExpertSampler(Skew.model_validate(skew), EXPERTS, top_k, seed)


def drawn(source: ExpertSampler, layer: int = 0, at_s: float = 0.0) -> NDArray[numpy.int32]:
    return numpy.concatenate([source.draw(layer, at_s, 200, index) for index in range(100)])


def shares(chosen: NDArray[numpy.int32]) -> NDArray[numpy.float64]:
    return numpy.bincount(chosen.ravel(), minlength=16) / chosen.size


def test_rows_hold_different_experts() -> None:
    chosen = drawn(sampler(kind="zipf", exponent=2))
    assert chosen.shape == (20_000, 4)
    assert all(len(set(row)) == 4 for row in chosen.tolist())


def test_zipf_gives_each_expert_its_share() -> None:
    source = sampler(top_k=2, kind="zipf", exponent=0.8)
    weights = numpy.arange(1, 17) ** -0.8
    assert source.popularity(0, 0.0) == pytest.approx(weights / weights.sum())
    assert shares(drawn(source)) == pytest.approx(weights / weights.sum(), abs=0.005)


def test_the_hot_set_gets_its_share_of_the_choices() -> None:
    found = shares(drawn(sampler(kind="hot_set", hot_experts=4, hot_share=0.8)))
    assert found[:4].sum() == pytest.approx(0.8, abs=0.01)
    assert found[:4] == pytest.approx([0.2] * 4, abs=0.01)


@pytest.mark.parametrize("share", [0.9, 1.0])
def test_an_expert_gets_at_most_every_row(share: float) -> None:
    found = drawn(sampler(kind="hot_set", hot_experts=1, hot_share=share))
    assert (found == 0).any(axis=1).all()
    assert shares(found)[1:] == pytest.approx([0.75 / 15] * 15, abs=0.005)


def test_uniform_is_even() -> None:
    assert balancedness(shares(drawn(sampler()))) > 0.95


def test_layers_share_a_ranking_unless_permuted() -> None:
    together, apart = sampler(kind="zipf"), sampler(kind="zipf", permute_layers=True)
    assert numpy.array_equal(together.popularity(0, 0), together.popularity(3, 0))
    assert not numpy.array_equal(apart.popularity(0, 0), apart.popularity(3, 0))
    assert numpy.array_equal(numpy.sort(apart.popularity(0, 0)), numpy.sort(together.popularity(0, 0)))


def test_popularity_shifts_at_its_time() -> None:
    source = sampler(kind="zipf", shifts=[{"at_s": 5, "by": 3}, {"at_s": 9, "by": 4}])
    assert [int(source.popularity(0, at_s).argmax()) for at_s in (4.9, 5.0, 9.0)] == [0, 3, 7]
    assert [int(shares(drawn(source, at_s=at_s)).argmax()) for at_s in (4.9, 5.0, 9.0)] == [0, 3, 7]


@pytest.mark.parametrize("probability", [0.0, 0.7, 1.0])
def test_pairs_come_together(probability: float) -> None:
    correlated = {"pairs": [(0, 5), (9, 2)], "probability": probability}
    chosen, free = drawn(sampler(correlated=correlated)), drawn(sampler())
    for first, second in correlated["pairs"]:
        together = numpy.mean((chosen[(chosen == first).any(axis=1)] == second).any(axis=1))
        by_chance = numpy.mean((free[(free == first).any(axis=1)] == second).any(axis=1))
        assert together == pytest.approx(by_chance + (1 - by_chance) * probability, abs=0.03)
    assert all(len(set(row)) == 4 for row in chosen.tolist())


def test_the_same_seeds_draw_the_same_rows() -> None:
    first, second = sampler(kind="zipf", permute_layers=True), sampler(kind="zipf", permute_layers=True)
    assert numpy.array_equal(first.draw(3, 0.0, 50, 7), second.draw(3, 0.0, 50, 7))
    assert not numpy.array_equal(first.draw(3, 0.0, 50, 7), first.draw(3, 0.0, 50, 8))
    other = sampler(kind="zipf", permute_layers=True, seed=2)
    assert not numpy.array_equal(first.popularity(3, 0.0), other.popularity(3, 0.0))


@pytest.mark.parametrize(
    ("skew", "top_k", "said"),
    [
        ({}, 17, "top_k: 17 experts per row, but layer 0 has 16"),
        ({"kind": "hot_set", "hot_experts": 16}, 2, "hot_experts: 16 are hot, but layer 0 has 16"),
        ({"correlated": {"pairs": [(0, 16)]}}, 2, r"has no pair \(0, 16\)"),
        ({"correlated": {"pairs": [(3, 3)]}}, 2, r"has no pair \(3, 3\)"),
        ({"correlated": {"pairs": [(0, 1)]}}, 1, "need a top_k of 2 or more"),
    ],
)
def test_what_no_layer_can_give_is_refused(skew: dict[str, Any], top_k: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sampler(top_k, **skew)
