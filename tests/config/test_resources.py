"""A cluster too small for a config is found before anything is deployed."""

from __future__ import annotations

import pytest
from config_values import config

from expertmesh.errors import ConfigError
from expertmesh.resources import SPARE_CPUS, check_room, custom_resources, logical_cpus, out_of_reach

GPU_GROUPS = (
    {"name": "a", "experts": "0-3"},
    {"name": "b", "experts": "4-7", "num_gpus": 1, "min_replicas": 2, "max_replicas": 4},
)


def test_room_on_one_or_several_nodes() -> None:
    check_room(config(), [{"CPU": 5}])
    check_room(config(*GPU_GROUPS), [{"CPU": 4}, {"CPU": 4, "GPU": 1}, {"CPU": 1, "GPU": 1}])


@pytest.mark.parametrize(
    ("groups", "nodes", "said"),
    [
        (GPU_GROUPS, [{"CPU": 9}], "group b: 2 replicas x 1 GPU do not fit: the cluster has 0 GPUs"),
        (GPU_GROUPS, [{"CPU": 9, "GPU": 1}], "group b: 2 replicas x 1 GPU do not fit: the cluster has 1 GPU"),
        (
            ({"name": "a", "experts": "0", "num_gpus": 2},),
            [{"CPU": 9, "GPU": 1}, {"GPU": 1}],
            "group a: 1 replica x 2 GPUs do not fit: the largest node has 1 GPU",
        ),
        (
            ({"name": "a", "experts": "0", "num_gpus": 2}, {"name": "b", "experts": "1", "num_gpus": 1}),
            [{"CPU": 9, "GPU": 2}],
            "router and groups need 3 GPUs together, the cluster has 2 GPUs",
        ),
        (({"name": "a", "experts": "0"},), [], "router: 1 replica x 2 CPUs do not fit: the cluster has 0 CPUs"),
        (({"name": "a", "experts": "0"},), [{"CPU": 2}], "need 4 CPUs together, the cluster has 2 CPUs"),
        (
            ({"name": "a", "experts": "0", "resources": {"pool": 2}},),
            [{"CPU": 9, "pool": 1}, {"CPU": 9}],
            "group a: resources: no node of the cluster has 2 pool",
        ),
    ],
)
def test_no_room(groups: tuple[dict[str, object], ...], nodes: list[dict[str, float]], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_room(config(*groups), nodes)
    assert said in str(caught.value)


def test_a_local_cluster_claims_enough_for_all_that_may_run() -> None:
    wanted = config(*GPU_GROUPS, engine={"max_replicas": 2})
    check_room(wanted, [{"CPU": logical_cpus(wanted), "GPU": 2}])
    assert logical_cpus(wanted) == 2 * 2 + 1 + 1 + 4 + SPARE_CPUS


def test_a_local_cluster_claims_what_sections_name() -> None:
    group = {"name": "a", "experts": "0-7", "resources": {"pool": 1}}
    wanted = config(group, engine={"resources": {"router": 0.5}}, directory={"resources": {"small": 0.001}})
    claimed = custom_resources(wanted)
    assert set(claimed) == {"pool", "router", "small"}
    check_room(wanted, [{"CPU": 9, **claimed}])


def test_a_group_that_sleeps_needs_no_room() -> None:
    check_room(config({"name": "a", "experts": "0", "num_gpus": 1, "min_replicas": 0}), [{"CPU": 3}])


@pytest.mark.parametrize(
    ("group", "room"),
    [
        ({"max_replicas": 6}, 6),
        ({"max_replicas": 7}, 6),
        ({"num_gpus": 0.5, "max_replicas": 4}, 4),
        ({"num_gpus": 0.5, "max_replicas": 5}, 4),
        ({"num_gpus": 0.3, "max_replicas": 7}, 5),
        ({"num_gpus": 2, "max_replicas": 1}, 0),
        ({"resources": {"near": 1}, "max_replicas": 2}, 1),
    ],
)
def test_replicas_out_of_reach_are_named(group: dict[str, object], room: int) -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0, "near": 1.5}]
    wanted = config({"name": "a", "experts": "0", **group})
    most = wanted.groups[0].max_replicas
    told = out_of_reach(wanted, nodes)
    assert bool(told) == (most > room)
    for line in told:
        assert line.startswith(
            f"group a: max_replicas {most} is out of reach: the nodes that are there have room for {room},"
        )
        assert "\n" not in line
