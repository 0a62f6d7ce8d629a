"""Whatever `cluster:` is written within the schema: what the chart renders is what `expertmesh up` would deploy."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from test_serve_config import cluster_config, manifest

from expertmesh.args import GroupArgs, RouterArgs
from expertmesh.deployment import serve_config
from expertmesh.kubernetes.groups import read_group
from expertmesh.kubernetes.serve_text import group_applications
from tools.chart.helm import CHART, HelmError, objects, template

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
AMPLE = {"requests": {"cpu": 4096}, "limits": {"memory": "4Ti", "cpu": 4096}}
Schema = dict[str, Any]
POOL = {"resources": AMPLE, "gpu": {"count": 64}, "minReplicas": 1, "maxReplicas": 2}
ROOM = {"router": POOL, "expertPools": [POOL | {"name": "pool"}]}
"""Pods in which any replica finds room, so that much of what is written is taken."""
KWARGS = st.dictionaries(
    st.sampled_from(["seed", "block_size", "tensor_parallel_size", "hf_overrides", "tokenizer_mode"]),
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.floats(-1e9, 1e9) | st.text("ab1_ :#'\"", max_size=9),
    max_size=2,
)
MOSTLY = st.integers(0, 19).map(lambda number: number != 13)
RANGES = st.tuples(st.integers(0, 127), st.integers(0, 127)).map(lambda ends: "{}-{}".format(*sorted(ends)))
BACKWARDS = st.just("5-3")
ASCENDING = st.lists(st.integers(0, 127).map(str) | RANGES, min_size=1, max_size=3).map(", ".join)
INDICES = MOSTLY.flatmap(lambda usual: ASCENDING if usual else BACKWARDS)
LAYERS = st.sampled_from(["0", "1-3", "0-63", "5, 7"])
OWN = {
    "experts": INDICES | st.integers(0, 127) | st.dictionaries(LAYERS, INDICES | st.integers(0, 127), min_size=1),
    "kwargs": KWARGS,
}
"""Of a model that has these layers and experts; of the schema's own kind few would be."""


class Yaml12(yaml.SafeLoader):
    """Reads 1e-05 as a number, as Go does and PyYAML does not."""


Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^-?[0-9]+(\.[0-9]*)?e[-+]?[0-9]+$"), list("-0123456789")
)


def values_of(schema: Schema, name: str = "") -> SearchStrategy[Any]:
    """All that a part of the chart's schema takes."""
    if name in OWN:
        return OWN[name]
    if "$ref" in schema:
        return values_of(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return st.one_of([values_of(one) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    return KINDS[schema["type"]](schema)


def numbers(schema: Schema) -> SearchStrategy[Any]:
    """Some of them whole, as people write them."""
    low, high, beyond = (
        schema.get("minimum", schema.get("exclusiveMinimum")),
        schema["maximum"],
        "minimum" not in schema,
    )
    anywhere = st.floats(low, high, exclude_min=beyond)
    return anywhere | st.integers(int(low) + beyond, int(high)) if high >= low + 1 else anywhere


def maps(schema: Schema) -> SearchStrategy[Any]:
    """With some of the keys that may be left out, or with none."""
    if "properties" not in schema:
        return st.just({})  # names of pools, which `clusters` puts there
    parts = {key: values_of(one, key) for key, one in schema["properties"].items()}
    needed = {key: parts.pop(key) for key in schema.get("required", ())}
    return st.fixed_dictionaries(needed, optional=parts) | st.fixed_dictionaries(needed)


KINDS: dict[str, Callable[[Schema], SearchStrategy[Any]]] = {
    "array": lambda one: st.lists(
        values_of(one["items"]), min_size=one.get("minItems", 1), max_size=one.get("maxItems", 3)
    ),
    "boolean": lambda _: st.booleans(),
    "integer": lambda one: st.integers(one["minimum"], one["maximum"]),
    "null": lambda _: st.none(),
    "number": numbers,
    "object": maps,
    "string": lambda one: st.from_regex(one["pattern"], fullmatch=True, alphabet=st.characters(codec="ascii")),
}


@st.composite
def clusters(draw: st.DrawFn) -> dict[str, Any]:
    """With names, bounds and ports that fit together more often than chance would have it, but not always."""
    made: dict[str, Any] = draw(values_of(SCHEMA["$defs"]["ChartCluster"]))
    made["model"] = {"artifact": f"/models{made['model']['artifact']}", "name": made["model"]["name"] or "m"}
    amount = st.floats(0.001, 1000) | st.integers(1, 1000)
    made["engine"]["resources"] = {"router": draw(amount)}
    made["directory"]["resources"] = {"router": draw(st.floats(0, 1, exclude_min=True))}
    if draw(MOSTLY):
        ports = draw(st.lists(st.integers(53_000, 65_535), min_size=5, max_size=5, unique=True))
        *single, first, last = sorted(ports)
        named = dict(zip(("http_port", "grpc_port", "grpc_tls_port"), draw(st.permutations(single)), strict=True))
        made["server"] = named | {"replica_ports": [first, last]}
    for one in (made["engine"], *made["groups"]):
        if draw(MOSTLY):
            bounds = sorted(one.pop(key, 1) for key in ("min_replicas", "max_replicas"))
            one.update(zip(("min_replicas", "max_replicas"), bounds, strict=True))
    engine = made["engine"]
    if engine.get("degrade_after_s") and draw(MOSTLY):
        engine["wait_for_experts_s"] = max(engine["degrade_after_s"], engine.get("wait_for_experts_s", 60))
    engine["num_cpus"] = min(engine.get("num_cpus", 1), 4095)
    for number, group in enumerate(made["groups"]):
        group["resources"] = {"pool": draw(amount)}
        group["name"] = f"{group['name'][:30]}{number}" if draw(MOSTLY) else group["name"]
        if group.get("emulated") and draw(MOSTLY):
            group["num_gpus"] = 0
    return made


TAKEN: Counter[bool] = Counter()


@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # each step of making a failure smaller would be a run of Helm
    suppress_health_check=list(HealthCheck),
)
@given(clusters(), st.booleans())
def test_what_the_chart_renders_is_what_up_would_deploy(
    tmp_path_factory: pytest.TempPathFactory, cluster: dict[str, Any], secured: bool
) -> None:
    """What it refuses is not asked for."""
    file = tmp_path_factory.mktemp("values") / "values.json"
    security = {"tls": {"mode": "generated" if secured else "off"}, "apiKeys": {"enabled": secured}}
    file.write_text(json.dumps({"model": {"prepare": {"enabled": False}}, "cluster": cluster} | ROOM | security))
    try:
        rendered = template(file)
    except HelmError as error:
        assert "cluster" in str(error), "nothing else is wrong"
        TAKEN[False] += 1
        return
    TAKEN[True] += 1
    assert_as_up_would(rendered, file)


def test_much_was_taken() -> None:
    """Otherwise the test above says little."""
    if TAKEN.total():
        assert TAKEN[True] > TAKEN.total() / 2


@pytest.mark.parametrize(
    "cluster",
    [
        # Helm takes away what is null, where values.yaml has something
        {"engine": {"dbo_token_threshold": None, "max_model_len": None}},
        # its targets are the defaults, not the cluster's
        {
            "scaling": {"up_after_s": 7},
            "groups": [{"name": "a", "experts": "0-7", "resources": {"pool": 1}, "scaling": {}}],
        },
    ],
    ids=["null", "empty scaling"],
)
def test_what_is_null_or_empty_says_something(tmp_path: Path, cluster: dict[str, Any]) -> None:
    file = tmp_path / "values.json"
    group = {"name": "a", "experts": 0, "resources": {"pool": 1}}
    model = {"model": {"name": "m", "artifact": "/models/artifact"}, "groups": [group]}
    file.write_text(json.dumps({"model": {"prepare": {"enabled": False}}, "cluster": model | cluster} | ROOM))
    assert_as_up_would(template(file), file)


def assert_as_up_would(rendered: str, file: Path) -> None:
    """The Serve config is that of the cluster which the values describe, and applications and client can read it."""
    (service,) = (one for one in objects(rendered) if one["kind"] == "RayService")
    text = service["spec"]["serveConfigV2"]
    found = yaml.load(text, Yaml12)
    config = cluster_config(file, service["metadata"]["name"])
    assert found == json.loads(json.dumps(serve_config(config, manifest())))
    for application in found["applications"]:
        if application["name"].startswith("experts-"):
            GroupArgs.model_validate(application["args"])
        elif application["name"] == "router":
            RouterArgs.model_validate(application["args"])
    read = {name: read_group(one) for name, one in group_applications(text).items()}
    unseen = {"memory_gib": None}  # a check of `up`, which Serve is not told
    assert read == {
        one.name: one.model_copy(update={"scaling": one.scaling or config.scaling} | unseen) for one in config.groups
    }
