"""Groups must serve every expert of every layer, none that does not exist, and fit into their memory."""

from __future__ import annotations

import pytest
from config_values import GIB, config, manifest

from expertmesh.coverage import check_context, check_coverage
from expertmesh.errors import ConfigError


def test_groups_that_cover_all_are_accepted() -> None:
    check_coverage(config(), manifest())
    overlapping = config({"name": "a", "experts": "0-7"}, {"name": "hot", "experts": {"3": "2"}})
    check_coverage(overlapping, manifest())


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([{"name": "a", "experts": "0-3"}], "layer 1: experts 4-7 are in no group"),
        ([{"name": "a", "experts": "0-6"}], "layer 1: expert 7 is in no group"),
        ([{"name": "a", "experts": {"1": "0-7", "3": "0-5,7"}}], "layer 3: expert 6 is in no group"),
        ([{"name": "a", "experts": {"1": "0-7"}}], "layer 3: experts 0-7 are in no group"),
        ([{"name": "a", "experts": "0-8"}], "group a: experts: layer 1 has experts 0-7, not 8"),
        ([{"name": "a", "experts": {"2": "0-7"}}], "layer 2 has no routed experts"),
        ([{"name": "a", "experts": "0-x"}], "'0-x' is not an index"),
    ],
)
def test_refused(groups: list[dict[str, object]], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_coverage(config(*groups), manifest())
    assert said in str(caught.value)


def test_a_group_larger_than_its_memory() -> None:
    big = manifest(expert_bytes=GIB // 5)
    check_coverage(config({"name": "a", "experts": "0-7", "memory_gib": 3.2}), big)
    with pytest.raises(ConfigError, match=r"group a: 3.2 GiB of experts, memory_gib is 1$"):
        check_coverage(config({"name": "a", "experts": "0-7", "memory_gib": 1}), big)


def test_max_model_len_within_the_model() -> None:
    wanted = config(engine={"max_model_len": 1024})
    check_context(wanted, {"max_position_embeddings": 1024})
    check_context(wanted, {})
    with pytest.raises(ConfigError, match="1024 is more than the model's 512 positions"):
        check_context(wanted, {"text_config": {"max_position_embeddings": 512}})
