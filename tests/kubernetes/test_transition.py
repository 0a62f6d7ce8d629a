"""From the groups that run to a plan's, as edits of text."""

from __future__ import annotations

from typing import Any

import pytest
from serve_configs import POOL, serve_text

from expertmesh.errors import ConfigError
from expertmesh.kubernetes.bounds import Bounds
from expertmesh.kubernetes.groups import known_model, read_group
from expertmesh.kubernetes.serve_text import diff, group_applications, read_applications, read_groups, set_bounds
from expertmesh.kubernetes.transition import propose, running_plan
from expertmesh.placement.plan import Plan

FINGERPRINT = "f" * 64
TEXT = serve_text()


def plan(*groups: dict[str, Any]) -> Plan:
    return Plan.model_validate({"fingerprint": FINGERPRINT, "groups": groups})


SPLIT = plan(
    {"name": "hot", "experts": {"0-1": "0-1"}, "max_replicas": 3},
    {"name": "warm", "experts": {"0-1": "2-3"}, "max_replicas": 5},
    {"name": "cold", "experts": {"0-1": "4-7"}, "min_replicas": 0},
)
"""hot gets other bounds, warm is new, and cold has other experts under its old name."""


def removed(before: str, after: str) -> list[str]:
    return [line for line in diff(before, after, "x").splitlines()[2:] if line.startswith("-")]


def test_a_plan_as_a_change() -> None:
    change = propose(TEXT, SPLIT).change
    assert (change.kept, change.resized, change.removed) == ((), ("hot",), ("cold",))
    warm, cold = change.added
    assert (warm, cold[:5], change.renamed) == ("warm", "cold-", {"cold": cold})


def test_new_groups_first_then_old_ones_go() -> None:
    transition = propose(TEXT, SPLIT).transition
    grown = transition.grow(TEXT)
    assert not removed(TEXT, grown), "what runs keeps its bytes"
    cold = min(transition.added)
    name = cold.removeprefix("experts-")
    assert read_groups(grown) == {"hot": Bounds(1, 2), "cold": Bounds(1, 1), "warm": Bounds(1, 5), name: Bounds(1, 1)}
    shrunk = transition.shrink(grown)
    assert read_groups(shrunk) == {"hot": Bounds(1, 3), "warm": Bounds(1, 5), name: Bounds(0, 1)}, "it may sleep now"
    application = len(removed(grown, shrunk)) - 2
    assert application == len(grown.splitlines()) - len(shrunk.splitlines()), "the old group goes, two bounds change"
    assert transition.wanted == shrunk
    assert transition.ungrow(grown) == TEXT


def test_each_edit_is_idempotent() -> None:
    transition = propose(TEXT, SPLIT).transition
    grown = transition.grow(TEXT)
    assert transition.grow(grown) == grown
    shrunk = transition.shrink(grown)
    assert transition.shrink(shrunk) == shrunk
    assert propose(shrunk, SPLIT).change.nothing


def test_what_others_change_meanwhile_stays() -> None:
    transition = propose(TEXT, SPLIT).transition
    scaled = set_bounds(transition.grow(TEXT), "cold", Bounds(2, 6))
    assert transition.ungrow(scaled) == set_bounds(TEXT, "cold", Bounds(2, 6))
    other = transition.grow(TEXT).replace("name: demo", "name: other")
    assert "name: other" in transition.shrink(other)
    with pytest.raises(ConfigError, match="others have removed application experts-"):
        transition.shrink(TEXT)


def test_the_way_back_is_a_plan() -> None:
    """Groups that are the same under whatever name are not moved."""
    shrunk = propose(TEXT, SPLIT).transition.wanted
    back = propose(shrunk, running_plan(TEXT, FINGERPRINT))
    assert back.change.added == ("cold",) and back.change.resized == ("hot",)
    assert read_applications(back.transition.wanted) == read_applications(TEXT)


def test_other_targets_change_the_policy_alone() -> None:
    """Which restarts nothing: they stand in the override."""
    wanted = [one.model_copy(update={"max_replicas": 4}) for one in running_plan(TEXT, FINGERPRINT).groups]
    assert wanted[0].scaling is not None
    wanted[0] = wanted[0].model_copy(update={"scaling": wanted[0].scaling.model_copy(update={"target_busy": 0.3})})
    proposal = propose(TEXT, Plan(fingerprint=FINGERPRINT, groups=tuple(wanted)))
    assert proposal.change.resized == ("hot", "cold")
    before, after = group_applications(TEXT), group_applications(proposal.transition.wanted)
    assert [one["args"] for one in before.values()] == [one["args"] for one in after.values()]
    hot = read_group(after["hot"])
    assert hot.scaling is not None and hot.scaling.target_busy == 0.3


def test_resources_come_from_the_plan() -> None:
    groups = [one.model_dump(exclude_none=True) for one in running_plan(TEXT, FINGERPRINT).groups]
    groups[0] |= {"name": "bigger", "num_gpus": 0.5}
    made = group_applications(propose(TEXT, plan(*groups)).transition.wanted)["bigger"]
    assert made["deployments"][0]["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0.5, "resources": POOL}
    assert made["args"]["device"] == "cuda"


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        ([{"name": "a", "experts": "0-6"}], "layer 0: no group holds experts 7"),
        ([{"name": "a", "experts": "0-8"}], "layer 0 has experts 0-7, not 8"),
        ([{"name": "a", "experts": {"0-2": "0-7"}}], "layer 2 has no routed experts"),
    ],
)
def test_plans_that_cannot_be_served(groups: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        propose(TEXT, plan(*groups))


def test_a_plan_of_another_model() -> None:
    manifest = known_model([]).model_copy(update={"fingerprint": "0" * 64, "layers": {0: 8, 1: 8}})
    with pytest.raises(ConfigError, match="made for model ffffffffffff, the artifact is 000000000000"):
        propose(TEXT, SPLIT, manifest)


def test_no_groups() -> None:
    with pytest.raises(ConfigError, match="deploys no groups"):
        propose("applications:\n- name: router\n", SPLIT)
