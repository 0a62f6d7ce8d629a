"""Plans: complete, within memory, repeatable; cheaper than uniform groups where loads are skewed; refusals."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_values import EXPERT_GIB, loads_of, manifest, zipf

from expertmesh.config import ClusterConfig, GroupSection
from expertmesh.errors import ConfigError
from expertmesh.placement.arrays import Floats
from expertmesh.placement.division import evaluate, fill
from expertmesh.placement.loads import Loads, pair_matrix
from expertmesh.placement.make import Bounds, propose
from expertmesh.placement.plan import Plan, check_plan
from expertmesh.placement.planner import Aims, cost, divide


def quarters(experts: int) -> tuple[GroupSection, ...]:
    size = experts // 4
    return tuple(
        GroupSection(name=f"q{n}", experts=f"{n * size}-{(n + 1) * size - 1}", max_replicas=50) for n in range(4)
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[Floats, Aims]:
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    extremes = st.sampled_from([0.0, 1e-300, 1e-9, 1.0, 1e15])
    load = draw(st.sampled_from([st.integers(0, 3), st.floats(0, 1e4, allow_subnormal=False), extremes]))
    rows = draw(st.lists(st.lists(load, min_size=experts, max_size=experts), min_size=layers, max_size=layers))
    array = numpy.array(rows, dtype=float)
    array[0, 0] = max(1.0, array[0, 0])
    held = draw(st.integers(1, experts))
    groups = draw(st.none() | st.integers(-(-experts // held), experts))
    aims = Aims(
        rows_per_replica=float(array.sum()) / draw(st.floats(0.1, 50)),
        groups=groups,
        memory_gib=draw(st.sampled_from([None, held * layers * EXPERT_GIB])),
        second_homes=draw(st.integers(0, 2)),
    )
    return array, aims


@settings(max_examples=100, deadline=None)
@given(problems())
def test_plans_are_complete_and_within_bounds(problem: tuple[Floats, Aims]) -> None:
    array, aims = problem
    model = manifest(dict.fromkeys(range(array.shape[0]), array.shape[1]))
    made = propose(model, loads_of(array), aims, Bounds())
    assert made == propose(model, loads_of(array), aims, Bounds())
    config = ClusterConfig.model_validate({"model": {"artifact": "/art"}, "groups": [{"name": "a", "experts": "0"}]})
    check_plan(made.plan, config, model)  # every expert somewhere, none that is not there, all in memory
    if aims.groups is not None:
        assert len(made.groups) == aims.groups
    for group in made.groups:
        assert group.busy <= aims.target_busy * (1 + 1e-6)
        assert 1 <= group.replicas <= group.max_replicas
        assert aims.memory_gib is None or group.memory_gib <= aims.memory_gib * (1 + 1e-9)
    assert sum(group.load_share for group in made.groups) == pytest.approx(1)
    assert 0 < made.planned.worst_layer_balancedness <= made.planned.balancedness * (1 + 1e-9) <= 1 + 1e-6


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 5))
def test_equal_loads_give_equal_balance_in_any_order(problem: tuple[Floats, Aims], turn: int) -> None:
    array, aims = problem
    model = manifest(dict.fromkeys(range(array.shape[0]), array.shape[1]))
    found = [divide(model, loads_of(one), aims).balancedness for one in (array, numpy.roll(array, turn, axis=1))]
    if aims.second_homes == 0:
        assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.0, 1.2])
@pytest.mark.parametrize("experts", [8, 16, 64, 256])
def test_less_memory_than_equal_groups(experts: int, exponent: float) -> None:
    array = 1000 * zipf(4, experts, exponent) / 4
    model = manifest(dict.fromkeys(range(4), experts))
    aims = Aims(rows_per_replica=100, groups=4)
    made = propose(model, loads_of(array), aims, Bounds(), quarters(experts))
    assert made.today is not None
    assert made.planned.memory_gib < made.today.memory_gib * 1.05
    assert made.planned.balancedness > made.today.balancedness
    if exponent >= 1:
        # hot experts gather in groups that cost little to replicate
        assert made.planned.memory_gib < made.today.memory_gib * 0.9
        assert made.groups[0].memory_gib < made.groups[-1].memory_gib
        assert made.groups[0].replicas > made.groups[-1].replicas
    densities = [group.load_share / group.experts_per_layer for group in made.groups]
    assert densities == sorted(densities, reverse=True)


def test_the_size_of_deepseek_v3() -> None:
    array = 1000 * zipf(61, 256, 1.0) / 61
    model = manifest(dict.fromkeys(range(61), 256))
    made = propose(model, loads_of(array), Aims(rows_per_replica=50), Bounds())
    assert made.planned.memory_gib < 1.2 * 61 * 256 * EXPERT_GIB
    assert made.planned.replicas <= 1.15 * 1000 / 30


def test_layers_of_different_sizes() -> None:
    model = manifest({0: 8, 1: 4, 5: 6})
    rates = {0: list(range(8)), 1: [1, 2, 3, 4], 5: [0, 0, 0, 0, 0, 9]}
    made = propose(model, Loads.model_validate({"rows_per_s": rates}), Aims(5.0, groups=3), Bounds())
    held = [group.expert_sets(model) for group in made.plan.groups]
    for layer, count in model.layers.items():
        assert set().union(*(one.get(layer, frozenset()) for one in held)) == set(range(count))


def together(array: Floats, aims: Aims, pairs: list[list[float]]) -> float:
    """Share of pairs that share a group."""
    model = manifest(dict.fromkeys(range(len(array)), array.shape[1]))
    loads = loads_of(array, coactivation=dict.fromkeys(range(len(array)), pairs))
    division = divide(model, loads, aims)
    found = 0.0
    for layer in range(len(array)):
        matrix = pair_matrix(loads.coactivation, layer, array.shape[1])
        assert matrix is not None
        held = division.held[layer].astype(float)
        found += float(numpy.einsum("ge,ef,gf->", held, matrix, held)) / matrix.sum() / len(array)
    return found


def test_pairs_apart_or_together() -> None:
    array = numpy.ones((2, 16)) + numpy.linspace(0, 0.01, 16)
    pairs = [[one, one + 1, 0.5] for one in range(0, 16, 2)]
    apart = together(array, Aims(10.0, groups=4, objective="spread"), pairs)
    gathered = together(array, Aims(10.0, groups=4, objective="gather"), pairs)
    assert apart == 0
    assert gathered > 0.7


def test_pairs_do_not_unbalance() -> None:
    array = 100 * zipf(3, 32, 0.8)
    pairs = [[one, one + 1, 0.1] for one in range(0, 32, 2)]
    model = manifest(dict.fromkeys(range(3), 32))
    plain = divide(model, loads_of(array), Aims(40.0, groups=4))
    paired = divide(model, loads_of(array, coactivation=dict.fromkeys(range(3), pairs)), Aims(40.0, groups=4))
    assert paired.balancedness.min() >= plain.balancedness.min() / 1.05


def test_second_homes_even_out() -> None:
    array = 100 * zipf(4, 8, 1.2)
    model = manifest(dict.fromkeys(range(4), 8))
    one, two = (divide(model, loads_of(array), Aims(1000.0, groups=4, second_homes=n)) for n in (0, 2))
    assert (one.held.sum(axis=1) == 1).all()
    assert (two.held.sum(axis=1) > 1).any()
    assert two.balancedness.mean() > one.balancedness.mean() + 0.1
    assert two.served.sum(axis=1) == pytest.approx(array)


def test_rows_go_to_the_least_loaded_of_an_experts_groups() -> None:
    assert fill(numpy.array([0.0, 4.0, 10.0]), numpy.array([1.0, 1.0, 2.0]), 6.0) == pytest.approx(
        [13 / 3 + 2 / 3, 1, 0]
    )
    held = numpy.array([[[True, True, False], [False, True, True]]])
    found = evaluate(held, numpy.array([[1.0, 4.0, 3.0]]), 100.0)
    assert found.served[0] == pytest.approx(numpy.array([[1, 3, 0], [0, 1, 3]]))
    assert found.balancedness == pytest.approx([1.0])


def test_a_group_keeps_its_name_while_it_holds_the_same() -> None:
    array = 100 * zipf(2, 16, 1.0)
    model = manifest({0: 16, 1: 16})
    made = propose(model, loads_of(array), Aims(20.0, groups=4), Bounds())
    assert made.plan.groups[0].name.startswith("hot-1-") and made.plan.groups[-1].name.startswith("cold-")
    again = propose(model, loads_of(2 * array), Aims(40.0, groups=4), Bounds(), made.plan.groups)
    assert [group.name for group in again.plan.groups] == [group.name for group in made.plan.groups]
    renamed = (made.plan.groups[0].model_copy(update={"name": "mine"}), *made.plan.groups[1:])
    named = propose(model, loads_of(array), Aims(20.0, groups=4), Bounds(), renamed)
    assert named.plan.groups[0].name == "mine"
    other = propose(model, loads_of(array[:, ::-1]), Aims(20.0, groups=4), Bounds(), made.plan.groups)
    assert not {group.name for group in other.plan.groups} & {group.name for group in made.plan.groups}


def test_resources_and_bounds_are_taken_over() -> None:
    array = 100 * zipf(2, 8, 1.0)
    today = (GroupSection(name="all", experts="0-7", num_cpus=3, max_replicas=2, max_queued_rows=77),)
    made = propose(manifest({0: 8, 1: 8}), loads_of(array), Aims(50.0, groups=2), Bounds(growth=2, sleep=True), today)
    assert {(one.num_cpus, one.max_queued_rows) for one in made.plan.groups} == {(3, 77)}
    assert [one.min_replicas for one in made.plan.groups] == [0 if "cold" in g.name else 1 for g in made.plan.groups]
    for group in made.groups:
        assert group.max_replicas >= max(group.replicas, group.busy * group.replicas * 2 / 0.6 - 1e-9)
    assert made.remarks == (
        "today: group all: scaling target not reachable: 60% busy needs 7 replicas, max_replicas is 2",
    )
    assert made.plan.predicted is not None
    assert made.plan.predicted.group_replicas == {one.name: one.replicas for one in made.groups}


def test_each_group_inherits_from_the_one_that_holds_most_of_its_load() -> None:
    array = numpy.array([[100.0, 90.0, 80.0, 70.0, 1.0, 1.0, 1.0, 1.0]])
    some: dict[str, Any] = {"max_replicas": 9, "scaling": {"target_busy": 0.3}, "resources": {"h100": 1}}
    today = (
        GroupSection.model_validate({"name": "a", "experts": "0-3", **some}),
        GroupSection.model_validate({"name": "b", "experts": "4-7", "scaling": {"target_busy": 0.9}}),
    )
    made = propose(manifest({0: 8}), loads_of(array), Aims(50.0, groups=4), Bounds(), today)
    for one in made.plan.groups:
        hot = min(one.expert_sets(manifest({0: 8}))[0]) < 4
        assert one.scaling == today[not hot].scaling and one.resources == today[not hot].resources
    assert any("differ in resources or targets" in remark for remark in made.remarks)
    sleepy = tuple(one.model_copy(update={"min_replicas": 0, "num_cpus": 2}) for one in made.plan.groups)
    same = propose(manifest({0: 8}), loads_of(array), Aims(50.0, groups=4), Bounds(), sleepy)
    assert same.plan.groups == sleepy


def test_predicted_replicas_are_of_the_plans_groups_and_within_their_bounds() -> None:
    plan = propose(manifest({0: 4}), loads_of(numpy.ones((1, 4))), Aims(100.0, groups=2), Bounds()).plan.model_dump()
    for wrong, said in (({"nosuch": 1}, "no group is called 'nosuch'"), ({plan["groups"][0]["name"]: 99}, "99 of")):
        plan["predicted"]["group_replicas"] = wrong
        with pytest.raises(ValueError, match=said):
            Plan.model_validate(plan)


def test_a_plan_of_too_many_replicas() -> None:
    with pytest.raises(ConfigError, match=r"plan: 1\.\d+e\+12 replicas would be needed, more than 1,000,000"):
        propose(manifest({0: 4}), loads_of(numpy.full((1, 4), 2.5e11)), Aims(1.0), Bounds())


def test_todays_groups_may_be_as_good() -> None:
    model = manifest({0: 4})
    made = propose(model, loads_of(numpy.ones((1, 4))), Aims(100.0), Bounds(), (GroupSection(name="a", experts="0-3"),))
    assert "today's groups need no more memory x time than this plan" in made.remarks
    assert made.plan.groups[0].name == "a"


def test_the_cheapest_of_all_divisions_of_a_small_model() -> None:
    """Against every way to give 5 experts of one layer to 2 groups."""
    rates = numpy.array([[40.0, 25.0, 10.0, 6.0, 3.0]])
    aims = Aims(30.0, groups=2)
    found = cost(divide(manifest({0: 5}), loads_of(rates), aims), aims.capacity)
    for mask in range(1, 31):
        first = numpy.array([bool(mask >> bit & 1) for bit in range(5)])
        division = evaluate(numpy.stack([first, ~first])[None], rates, aims.capacity)
        assert found <= cost(division, aims.capacity) * 1.01


@pytest.mark.parametrize(
    ("aims", "said"),
    [
        (Aims(10.0, memory_gib=EXPERT_GIB), "cannot hold one expert of each of 2 layers"),
        (
            Aims(10.0, groups=2, memory_gib=6 * EXPERT_GIB),
            "2 groups of 3 experts per layer, which memory holds, are too",
        ),
        (Aims(10.0, groups=9), "9 groups cannot share 8 experts per layer"),
        (Aims(1.0, max_replicas=3), "not reachable: the hottest expert of each layer needs .* max_replicas is 3"),
        (Aims(10.0, groups=1, max_replicas=30), "not reachable: 34 replicas are needed, 1 groups of 30 replicas each"),
        (Aims(10.0, objective="gather"), "objective gather: these loads do not tell which experts fire together"),
    ],
)
def test_plans_that_cannot_be(aims: Aims, said: str) -> None:
    array = 100 * zipf(2, 8, 0.1)
    with pytest.raises(ConfigError, match=said):
        propose(manifest({0: 8, 1: 8}), loads_of(array), aims, Bounds())


def test_loads_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="loads: rows_per_s: layer 1 is missing"):
        divide(manifest({0: 8, 1: 8}), loads_of(zipf(1, 8, 1.0)), Aims(10.0))
