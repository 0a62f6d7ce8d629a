"""What comes and goes, and in which order: pure functions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import serve_configs

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import GroupSection
from expertmesh.coverage import GIB
from expertmesh.errors import ConfigError
from expertmesh.rebalance.change import Change, difference, held_experts
from expertmesh.rebalance.outlook import look_ahead
from expertmesh.rebalance.steps import Fits, Stage, Step, make_stages, make_steps, removable


def manifest(expert_bytes: int = 1024) -> Manifest:
    return serve_configs.manifest(expert_bytes).model_copy(update={"layers": {1: 8, 3: 8}})


MODEL = manifest()


def groups(**experts: Any) -> tuple[GroupSection, ...]:
    """a="0-3", b={"experts": ..., "num_cpus": 2}."""
    values = [
        {"name": n.replace("_", "-"), **(e if isinstance(e, dict) else {"experts": e})} for n, e in experts.items()
    ]
    return tuple(GroupSection.model_validate(one) for one in values)


def held(change: Change) -> dict[str, Any]:
    return held_experts((*change.before, *change.after), MODEL)


def new(change: Change) -> dict[str, GroupSection]:
    return {group.name: group for group in change.after}


def room(cpus: float) -> Fits:
    def fits(deployed: Sequence[GroupSection]) -> str:
        needed = sum(group.num_cpus * group.min_replicas for group in deployed)
        return f"{needed:g} CPUs of {cpus:g}" if needed > cpus else ""

    return fits


def covered(steps: Sequence[Step]) -> bool:
    """Whether every expert is in some group after every step."""
    everything = {(layer, expert) for layer, count in MODEL.layers.items() for expert in range(count)}
    return all(
        {(layer, one) for group in step.groups for layer, found in group.expert_sets(MODEL).items() for one in found}
        == everything
        for step in steps
    )


BEFORE = groups(a="0-3", b="4-7")


def test_the_same_groups_are_no_change() -> None:
    change = difference(BEFORE, BEFORE, MODEL)
    assert change.nothing and change.kept == ("a", "b")
    assert make_steps(change, held(change), room(2)) == ()


def test_experts_are_compared_as_sets() -> None:
    same = groups(a="3,0-2", b={"experts": {"1": "4-7", "3": "4,5,6-7"}})
    change = difference(BEFORE, same, MODEL)
    assert change.nothing
    assert change.after == BEFORE, "as it was written: other text among its arguments would restart it"


def test_bounds_and_targets_change_in_place() -> None:
    wanted = groups(a={"experts": "0-3", "max_replicas": 4, "scaling": {"target_busy": 0.5}}, b="4-7")
    change = difference(BEFORE, wanted, MODEL)
    assert (change.kept, change.resized, change.added, change.removed) == (("b",), ("a",), (), ())
    (step,) = make_steps(change, held(change), room(2))
    assert (step.kind, step.names, step.groups) == ("settle", ("a",), wanted)


@pytest.mark.parametrize("other", [{"experts": "0-4"}, {"experts": "0-3", "num_cpus": 2}])
def test_a_group_of_the_same_name_and_other_content_is_renamed(other: dict[str, Any]) -> None:
    wanted = groups(a=other, b="4-7")
    change = difference(BEFORE, wanted, MODEL)
    assert change.removed == ("a",) and change.kept == ("b",)
    (name,) = change.added
    assert change.renamed == {"a": name} and name.startswith("a-") and len(name) == 8
    assert difference(change.after, wanted, MODEL).nothing, "the same plan again is no change"
    back = difference(change.after, BEFORE, MODEL)
    assert back.added == ("a",) and back.removed == (name,)


def test_long_names_stay_names() -> None:
    long = {"a" * 40: "0-3", "b": "4-7"}
    change = difference(groups(**long), groups(**long | {"a" * 40: "0-4"}), MODEL)
    assert GroupSection.model_validate(change.after[0].model_dump()).name == change.added[0]


def test_a_group_that_runs_under_another_name_runs_on() -> None:
    change = difference(BEFORE, groups(x="4-7", y="0-1", z="2-3"), MODEL)
    assert change.kept == ("b",) and change.renamed == {"x": "b"}
    assert (change.added, change.removed) == (("y", "z"), ("a",))


def test_two_groups_of_the_same_content_stay_two() -> None:
    change = difference(BEFORE, groups(x="0-3", y="0-3", z="4-7"), MODEL)
    assert change.kept == ("a", "b") and change.added == ("y",) and not change.removed


def test_side_by_side_all_new_groups_serve_before_any_old_one_goes() -> None:
    change = difference(BEFORE, groups(x="0-1", y="2-5", z="6-7"), MODEL)
    steps = make_steps(change, held(change), room(5))
    assert [step.text for step in steps] == [
        *("start x", "verify x", "start y", "verify y", "start z", "verify z"),
        *("use x, y, z", "remove a, b"),
    ]
    assert covered(steps)
    assert steps[-1].groups == change.after


def test_without_room_groups_change_one_after_another() -> None:
    change = difference(BEFORE, groups(x="0-3,4", y="5-7"), MODEL)
    steps = make_steps(change, held(change), room(3))
    assert [step.text for step in steps] == [
        *("start x", "verify x", "use x", "remove a", "start y", "verify y", "use y", "remove b")
    ]
    assert covered(steps)


def test_in_steps_when_asked() -> None:
    change = difference(BEFORE, groups(x="0-3,4", y="5-7"), MODEL)
    assert make_stages(change, new(change), held(change), room(99), in_steps=True) == (
        Stage(("x",), ("a",)),
        Stage(("y",), ("b",)),
    )


def test_no_room_for_any_order() -> None:
    change = difference(BEFORE, groups(x="0-3,4", y="5-7"), MODEL)
    with pytest.raises(ConfigError, match="no order of its groups fits beside those that run: 4 CPUs of 2"):
        make_steps(change, held(change), room(2))


def test_what_others_hold_already_goes_first() -> None:
    before = groups(all="0-7", spare="0-3")
    change = difference(before, groups(all="0-7", extra="5"), MODEL)
    assert make_stages(change, new(change), held(change), room(2)) == (Stage((), ("spare",)), Stage(("extra",), ()))


def test_an_added_copy_of_hot_experts_removes_nothing() -> None:
    change = difference(BEFORE, (*BEFORE, *groups(hot="1")), MODEL)
    steps = make_steps(change, held(change), room(3))
    assert [step.text for step in steps] == ["start hot", "verify hot", "use hot"]


def test_a_sleeping_group_is_awake_until_it_is_verified() -> None:
    change = difference(BEFORE, groups(x={"experts": "0-3,5", "min_replicas": 0}, b="4-7"), MODEL)
    steps = make_steps(change, held(change), room(3))
    assert [step.text for step in steps] == ["start x", "verify x", "use x", "remove a", "settle x"]
    assert [group.min_replicas for group in steps[0].groups if group.name == "x"] == [1]
    assert steps[-1].groups == change.after


def test_a_group_starts_with_as_many_replicas_as_it_will_need_and_settles_to_its_bounds() -> None:
    wanted = groups(x={"experts": "0-3,5", "max_replicas": 4}, b="4-7")
    change = difference(BEFORE, wanted, MODEL)
    steps = make_steps(change, held(change), room(99), {"x": 9, "b": 7})
    assert [step.text for step in steps][-1] == "settle x"
    assert {group.name: group.min_replicas for group in steps[0].groups} == {"a": 1, "b": 1, "x": 4}
    assert steps[-1].groups == change.after


def test_of_two_groups_that_cover_each_other_one_stays() -> None:
    change = difference(groups(a="0-7", b="0-7"), groups(c="0-1", d="2-7"), MODEL)
    assert removable(["a", "b"], ["a", "b"], held(change)) == ("a",)


def test_every_division_into_two_reaches_every_other_with_all_experts_served() -> None:
    cuts = [groups(**{f"l{cut}": f"0-{cut}", f"r{cut}": f"{cut + 1}-7"}) for cut in range(7)]
    for before, after in itertools.permutations(cuts, 2):
        change = difference(before, after, MODEL)
        for cpus in (4, 3):
            try:
                steps = make_steps(change, held(change), room(cpus))
            except ConfigError:
                assert cpus == 3
                continue
            assert covered(steps) and {one.name for one in steps[-1].groups} == {one.name for one in change.after}
            assert max(len(step.groups) for step in steps) <= cpus


def test_outlook_counts_what_is_there_together() -> None:
    model = manifest(expert_bytes=GIB)
    change = difference(
        BEFORE, groups(x="0-3,4", y={"experts": "5-7", "num_cpus": 2, "min_replicas": 2, "max_replicas": 2}), model
    )
    steps = make_steps(change, held_experts((*change.before, *change.after), model), lambda _: "")
    outlook = look_ahead(change, steps, model, {"a": 3, "b": 1}, 0.9)
    assert (outlook.now.replicas, outlook.peak.replicas, outlook.after.replicas) == (4, 7, 3)
    assert (outlook.now.memory_gib, outlook.after.memory_gib) == (3 * 8 + 8, 10 + 2 * 6)
    assert outlook.peak.num_cpus == 3 + 1 + 1 + 4
    assert outlook.predicted_balancedness == 0.9
