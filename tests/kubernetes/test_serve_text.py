"""Bounds of one group in a Serve config's text: nothing else changes."""

from __future__ import annotations

import json

import pytest
import yaml
from serve_configs import serve_text

from expertmesh.errors import ConfigError
from expertmesh.kubernetes.bounds import Bounds, read_bounds, with_bounds
from expertmesh.kubernetes.serve_text import bounds_of, diff, read_applications, read_groups, set_bounds


def changed_lines(before: str, after: str) -> list[str]:
    return [line for line in diff(before, after, "x").splitlines()[2:] if line[0] in "+-"]


def test_only_the_two_bounds_change() -> None:
    text = serve_text()
    made = set_bounds(text, "hot", Bounds(3, 9))
    assert changed_lines(text, made) == [
        "-      max_replicas: 2",
        "+      max_replicas: 9",
        "-      min_replicas: 1",
        "+      min_replicas: 3",
    ]
    assert read_groups(made) == {"hot": Bounds(3, 9), "cold": Bounds(1, 1)}
    assert set_bounds(made, "hot", Bounds(1, 2)) == text


def test_the_same_bounds_change_nothing() -> None:
    text = serve_text()
    assert set_bounds(text, "cold", Bounds(1, 1)) is text


def test_equal_bounds_keep_the_policy() -> None:
    """Without it a group that is given a range again would not follow its load."""
    text = serve_text()
    made = set_bounds(set_bounds(text, "hot", Bounds(2, 2)), "hot", Bounds(1, 2))
    assert made == text


def test_json_in_a_line_stays_json_in_a_line() -> None:
    text = json.dumps(yaml.safe_load(serve_text()))
    made = set_bounds(text, "cold", Bounds(0, 4))
    assert json.loads(made)["applications"][0] == json.loads(text)["applications"][0]
    assert abs(len(made) - len(text)) < 5
    assert bounds_of(made, "cold") == Bounds(0, 4)


def test_fixed_numbers_of_other_tools() -> None:
    override = {"name": "ExpertReplica", "num_replicas": 2, "max_ongoing_requests": 5}
    ranged = with_bounds(override, Bounds(1, 3))
    assert list(ranged.items())[1] == ("autoscaling_config", {"min_replicas": 1, "max_replicas": 3})
    assert with_bounds(ranged, Bounds(2, 2)) == override
    assert read_bounds({"name": "x"}) == Bounds(1, 1)
    initial = with_bounds({"autoscaling_config": {"initial_replicas": 9, "max_replicas": 9}}, Bounds(0, 3))
    assert initial["autoscaling_config"]["initial_replicas"] == 3


def test_a_group_without_an_override_gets_one() -> None:
    text = "applications:\n- name: experts-a\n  args: {}\n- name: router\n"
    assert set_bounds(text, "a", Bounds(2, 2)) == (
        "applications:\n- name: experts-a\n  args: {}\n  deployments:\n  - name: ExpertReplica\n    num_replicas: 2\n"
        "- name: router\n"
    )


@pytest.mark.parametrize(
    ("least", "most", "why"),
    [(3, 2, "3 to 2: MIN is above MAX"), (-1, 2, "MIN is at least 0"), (0, 0, "MAX at least 1")],
)
def test_bounds_that_contradict(least: int, most: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Bounds(least, most)


def test_an_unknown_group_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^no group 'hto'; the groups are hot, cold$"):
        set_bounds(serve_text(), "hto", Bounds(1, 1))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no list of applications"),
        ("applications: 3", "holds no list of applications"),
        ("applications:\n- args: {}", "an application has no name"),
        ("applications: [", "not YAML"),
    ],
)
def test_what_is_no_serve_config(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"^serveConfigV2: {why}"):
        read_applications(text)


def test_replicas_that_are_no_number() -> None:
    text = "applications:\n- name: experts-a\n  deployments:\n  - name: ExpertReplica\n    num_replicas: auto\n"
    with pytest.raises(ConfigError, match="ExpertReplica: 'auto' is no number"):
        read_groups(text)
