"""Groups of a Serve config as a cluster config has them, and back."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from serve_configs import POOL, cluster, serve_text

from expertmesh.config import GroupSection, ScalingSection
from expertmesh.errors import ConfigError
from expertmesh.kubernetes.groups import check_covers, filled, known_model, make_application, read_group
from expertmesh.kubernetes.serve_text import group_applications

DESCRIBED: tuple[dict[str, Any], ...] = (
    {"name": "hot", "experts": "0-1", "max_replicas": 4, "num_cpus": 2.5, "scaling": {"target_busy": 0.7}},
    {"name": "cold", "experts": {"0": "2-7", "1": "2-5"}, "min_replicas": 0, "max_queued_rows": 100},
    {"name": "rest", "experts": {"1": "6-7"}, "emulated": {"teraflops": 1, "memory_gb_per_s": 10}},
)


def test_groups_are_read_back() -> None:
    found = group_applications(serve_text(*DESCRIBED))
    default = ScalingSection()
    wanted = [group.model_copy(update={"scaling": group.scaling or default}) for group in cluster(*DESCRIBED).groups]
    assert [read_group(one) for one in found.values()] == wanted


@pytest.mark.parametrize("security", [{}, {"tls": {"ca": "/a", "certificate": "/b", "key": "/c"}}])
def test_a_new_group_is_what_a_cluster_config_would_have_made_of_it(security: dict[str, Any]) -> None:
    """Artifact, ports, TLS and the like come from a group that runs."""
    found = group_applications(serve_text(*DESCRIBED, security=security))
    for like in found.values():
        for name, one in found.items():
            assert make_application(read_group(one), like) == one, name


def test_keys_that_are_not_known_here_are_kept() -> None:
    (like,) = group_applications(serve_text(DESCRIBED[0])).values()
    like = {**like, "runtime_env": {"env_vars": {"A": "1"}}}
    made = make_application(GroupSection(name="new", experts="2"), like)
    assert made["runtime_env"] == like["runtime_env"]
    assert (made["name"], made["args"]["group"], made["args"]["experts"]) == ("experts-new", "new", "2")


def test_an_application_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="application experts-a: artifact: is missing"):
        read_group({"name": "experts-a", "args": {"group": "a", "experts": "0"}})


def test_a_plan_is_filled_with_what_a_cluster_config_would_add() -> None:
    running = [read_group(one) for one in group_applications(serve_text(*DESCRIBED)).values()]
    hot, new = filled([GroupSection(name="hot", experts="0-1"), GroupSection(name="new", experts="2")], running)
    assert hot.scaling is not None and hot.scaling.target_busy == 0.7, "its own targets stay"
    assert new.scaling == ScalingSection(), "most groups' targets"
    assert new.resources == POOL, "the one pool of all groups"


def test_a_plan_names_the_pool_where_there_are_several() -> None:
    running = [
        GroupSection(name="a", experts="0", resources={"small": 1}),
        GroupSection(name="b", experts="1", resources={"large": 1}),
    ]
    with pytest.raises(ConfigError, match="group new: resources: name the pool it runs in, one of large, small"):
        filled([GroupSection(name="new", experts="2")], running)


def test_the_model_as_far_as_its_groups_tell() -> None:
    assert known_model(cluster(*DESCRIBED).groups).layers == {0: 8, 1: 8}
    assert known_model([GroupSection(name="a", experts="0-7")]).layers == {0: 8}
    mixed = [GroupSection(name="a", experts="0-7"), GroupSection(name="b", experts={"3-4": "8-9"})]
    assert known_model(mixed).layers == {3: 10, 4: 10}


def test_an_expert_that_is_left_out_is_named() -> None:
    model = known_model(cluster(*DESCRIBED).groups)
    with pytest.raises(ConfigError, match="layer 1: no group holds experts 6-7"):
        check_covers(cluster(*DESCRIBED[:2]).groups, model)


def test_it_is_plain_yaml() -> None:
    (like,) = group_applications(serve_text(DESCRIBED[0])).values()
    made = make_application(GroupSection(name="new", experts={"0": "2"}), like)
    assert yaml.safe_load(yaml.safe_dump(made)) == made
