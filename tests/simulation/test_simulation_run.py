"""Whole simulations: rows are kept, seeds repeat, the policy is the real one, and skew is what scaling alone saves."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from simulation.scenarios import scenario

from expertmesh.scaling import policy
from expertmesh.simulation import planning, strategies
from expertmesh.simulation.course import Course
from expertmesh.simulation.layout import make_layout
from expertmesh.simulation.results import summarize
from expertmesh.simulation.run import Simulated, simulate
from expertmesh.simulation.traffic import Traffic


def of(found: Simulated, name: str) -> Course:
    return next(one for one in found.courses if one.name == name)


def saved(found: Simulated) -> float:
    return float(summarize(found)["saved_by_groups"]["uniform"]["replica_seconds"])


@pytest.mark.parametrize("most", [64, 1])
def test_rows_are_served_or_wait(most: int) -> None:
    """With one replica of each group, many wait."""
    found = simulate(scenario(division__max_replicas=most))
    for one in found.courses:
        totals = one.totals
        assert totals.rows_served + totals.rows_waiting == pytest.approx(totals.rows_in)
        assert (totals.rows_waiting > 0.1 * totals.rows_in) == (most == 1)
    assert len({one.totals.rows_in for one in found.courses}) == 1, "the same traffic"


def test_a_seed_repeats_itself_and_another_does_not() -> None:
    described = scenario(traffic__noise=0.1, traffic__bursts={"per_day": 200})
    first, again, other = (
        summarize(simulate(one)) for one in (described, described, scenario(seed=4, traffic__noise=0.1))
    )
    assert first == again
    assert first["strategies"] != other["strategies"]


def test_the_policy_and_the_planner_are_those_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    from expertmesh.placement import planner

    assert strategies.decide is policy.decide
    assert planning.divide is planner.divide
    calls: list[Any] = []

    def noting(load: policy.GroupLoad, *rest: Any) -> Any:
        calls.append(load)
        return policy.decide(load, *rest)

    monkeypatch.setattr(strategies, "decide", noting)
    found = simulate(scenario(duration_s=100, strategies=["groups"]))
    assert len(calls) == 10 * len(found.layout.groups), "every group at every tick"
    assert all(len(load.replicas) == load.running for load in calls)


def test_skew_is_what_scaling_alone_saves() -> None:
    gains = [
        saved(simulate(scenario(traffic__popularity={"exponent": exponent}, strategies=["groups", "uniform"])))
        for exponent in (0.0, 0.5, 1.0)
    ]
    assert gains == sorted(gains)
    assert abs(gains[0]) < 0.02
    assert gains[2] > gains[1] + 0.1


def test_groups_follow_a_load_that_rises_and_falls() -> None:
    described = scenario(
        duration_s=86400, policy={"tick_s": 30}, traffic__trough_share=0.2, traffic__peak_at_h=12, strategies=["groups"]
    )
    found = simulate(described)
    by_hour = {round(one.at_s / 3600, 2): one.running for one in found.samples}
    assert by_hour[12.0] > 2 * by_hour[0.0]
    assert by_hour[0.0] == pytest.approx(found.samples[-1].running, rel=0.25)
    one = of(found, "groups")
    assert one.totals.rows_in_time > 0.98 * one.totals.rows_in


def test_a_group_without_rows_sleeps_and_wakes() -> None:
    """Expert 7 is chosen by nobody until ranks change."""
    described = scenario(
        model={"layers": 1, "experts": 8, "top_k": 1, "hidden_size": 2048, "intermediate_size": 1408},
        division={"layers_per_group": 1, "experts_per_group": 1, "min_replicas": 0, "max_replicas": 8},
        traffic={
            "peak_tokens_per_s": 2.0,
            "tokens_per_step": 1,
            "popularity": {"exponent": 10, "switch_every_s": 1200, "switch_share": 1},
        },
        scaling={"idle_after_s": 120},
        duration_s=2400,
        strategies=["groups"],
    )
    found = simulate(described)
    one = found.courses[0]
    assert one.used.downs > 0
    assert one.running.count(0) > 0
    assert sum(one.running) > 0
    assert one.totals.rows_served + one.totals.rows_waiting == pytest.approx(one.totals.rows_in)


def test_from_one_plan_to_the_next_no_row_is_lost() -> None:
    described = scenario(planner={"every_s": 600, "groups": 6}, strategies=["planned"])
    found = simulate(described)
    (one,) = found.courses
    assert one.plans == 3
    assert one.totals.rows_served + one.totals.rows_waiting == pytest.approx(one.totals.rows_in)
    assert sum(count > 0 for count in one.running) == 6, "only the last plan's groups run"
    assert one.running[:6] == (0,) * 6


def test_chances_of_a_layer_sum_to_top_k_while_they_change() -> None:
    described = scenario()
    traffic = Traffic(described)
    for tick in (0, 59, 60, 66, 72, 100, 179, 3):
        chances = traffic.chances(tick).reshape(4, 32)
        assert numpy.allclose(chances.sum(axis=1), 4)
        assert chances.max() <= 1 + 1e-12
    assert not numpy.allclose(traffic.chances(0), traffic.chances(100))
    assert numpy.array_equal(traffic.chances(0), Traffic(described).chances(0))


def test_groups_of_the_scenario_cover_the_model() -> None:
    layout = make_layout(scenario(division__layers_per_group=3, division__experts_per_group=5))
    assert len(layout.groups) == 2 * 7
    assert sorted(layout.pairs.tolist()) == list(range(4 * 32))
    assert layout.layers.tolist() == [3] * 7 + [1] * 7
