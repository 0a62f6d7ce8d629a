"""Text that is changed in place: what stays keeps its bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertmesh.errors import ConfigError
from expertmesh.kubernetes.yaml_text import NotEditable, load, rewrite

TEXT = """\
# who wrote it
host: "0.0.0.0"   # all
applications:
- name: a
  args: {x: 1}

# the second
- name: b
  deployments:
  - name: E
    num_replicas: 2  # fixed
    options:
        num_cpus: 1
  note: |
    two
    lines
- {name: c, replicas: [1, 2]}
"""


def changed(text: str, edit: Any) -> str:
    before, after = load(text, "text"), load(text, "text")
    edit(after)
    return rewrite(text, before, after)


def deployment(content: Any) -> Any:
    return content["applications"][1]["deployments"][0]


def test_a_number_alone_changes() -> None:
    made = changed(TEXT, lambda content: deployment(content).update(num_replicas=30))
    assert made == TEXT.replace("num_replicas: 2", "num_replicas: 30")


def test_a_key_takes_the_place_of_another() -> None:
    def edit(content: Any) -> None:
        del deployment(content)["num_replicas"]
        deployment(content)["autoscaling_config"] = {"min_replicas": 0, "max_replicas": 3}

    new = "autoscaling_config:\n      min_replicas: 0\n      max_replicas: 3"
    assert changed(TEXT, edit) == TEXT.replace("num_replicas: 2", new)


def test_a_new_key_comes_last() -> None:
    made = changed(TEXT, lambda content: deployment(content)["options"].update(num_gpus=1))
    assert made == TEXT.replace("num_cpus: 1\n", "num_cpus: 1\n        num_gpus: 1\n")


def test_items_are_matched_by_name() -> None:
    made = changed(TEXT, lambda content: content["applications"].append({"name": "d", "args": {"y": [1]}}))
    assert made == TEXT + "- name: d\n  args:\n    y:\n    - 1\n"
    made = changed(TEXT, lambda content: content["applications"].pop(0))
    assert made == TEXT.replace("- name: a\n  args: {x: 1}\n", "")
    made = changed(TEXT, lambda content: content["applications"].pop())
    assert made == TEXT.replace("- {name: c, replicas: [1, 2]}\n", "")


def test_a_block_of_lines_goes_with_its_item() -> None:
    made = changed(TEXT, lambda content: content["applications"].pop(1))
    assert [one["name"] for one in load(made, "text")["applications"]] == ["a", "c"]
    assert "lines" not in made and made.endswith("# the second\n- {name: c, replicas: [1, 2]}\n")


def test_brackets_stay_brackets() -> None:
    text = json.dumps(load(TEXT, "text"))
    made = changed(text, lambda content: content["applications"].append({"name": "d", "route_prefix": None}))
    assert made == text[:-2] + ', {"name": "d", "route_prefix": null}]}'
    for gone in (slice(0, 1), slice(1, 3), slice(0, 2), slice(2, 3)):
        kept = load(TEXT, "text")["applications"]
        del kept[gone]
        made = changed(text, lambda content, kept=kept: content.update(applications=kept))
        assert json.loads(made)["applications"] == kept
        assert all(json.dumps(one) in made for one in kept)


def test_an_alias_is_refused_where_it_would_change_more() -> None:
    text = "applications:\n- name: a\n  options: &shared\n    n: 1\n- name: b\n  options: *shared\n"
    with pytest.raises(NotEditable, match="aliases"):
        changed(text, lambda content: content["applications"][1].update(options={"n": 2}))


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\t- x", "[" * 3000, "a: \x00"])
def test_what_is_not_yaml_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^the text: not YAML: [^\n]+$"):
        load(text, "the text")


NAMES = st.sampled_from(list("abcdef"))
TEXTS = ["", "x", "two words", "- a", "k: v", "#", "'", '"', "yes", "1", "line\n", "a\n b\n", "é", "{", "]", ", "]
SCALARS = st.sampled_from([*TEXTS, 0, -1, 2.5, True, None])
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(NAMES, SCALARS, max_size=2)
ITEMS = st.lists(
    st.tuples(NAMES, st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES, max_size=2), max_size=3)),
    min_size=1,
    max_size=4,
    unique_by=lambda one: one[0],
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(before=ITEMS, after=ITEMS, flow=st.sampled_from([None, False, True]), indent=st.sampled_from([2, 4]))
def test_any_list_becomes_any_other(before: Any, after: Any, flow: bool | None, indent: int) -> None:
    old, new = ({"x": 1, "items": [{"name": name, **rest} for name, rest in one], "y": 2} for one in (before, after))
    text = yaml.safe_dump(old, default_flow_style=flow, indent=indent, allow_unicode=True)
    try:
        made = rewrite(text, old, new)
    except NotEditable:
        pytest.fail(f"not editable:\n{text}")
    found = yaml.safe_load(made)
    assert {one["name"]: one for one in found["items"]} == {one["name"]: one for one in new["items"]}
    assert (found["x"], found["y"]) == (1, 2)
    if old == new:
        assert made == text
