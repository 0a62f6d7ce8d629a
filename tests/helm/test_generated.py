"""What is generated is up to date, and says what ClusterConfig says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from expertmesh.config import (
    ClusterConfig,
    DirectorySection,
    EngineSection,
    GroupSection,
    ModelSection,
    ScalingSection,
    ServerSection,
)
from tools.chart import readme, schema
from tools.chart.__main__ import generated
from tools.chart.helm import CHART
from tools.chart.values import LEFT_OUT, ChartGroup, ChartModel, ChartServer, ChartValues

MAPS = r"([aA]nnotations|[lL]abels|nodeSelector|resources)(/anyOf/\d)?$"


def defaults() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return loaded


def test_generated_files_are_up_to_date() -> None:
    stale = [path for path, text in generated() if not path.exists() or path.read_text() != text]
    assert not stale, "run `make chart`"


def test_values_hold_the_keys_of_cluster_config() -> None:
    """A key that ClusterConfig gains must come into the chart, or be among those that it sets by itself."""
    assert {"name", "security"} == LEFT_OUT
    values = defaults()["cluster"]
    assert set(values) | LEFT_OUT == set(ClusterConfig.model_fields)
    assert values["scaling"] == ScalingSection().model_dump()
    assert values["directory"] == DirectorySection(resources={"router": 0.001}).model_dump()
    assert values["engine"] == EngineSection(resources={"router": 1}).model_dump()


def test_sections_of_the_charts_own_have_their_keys() -> None:
    """What the chart leaves out of a section it sets by itself."""
    assert set(ServerSection.model_fields) - set(ChartServer.model_fields) == {"host", "replica_host"}
    assert set(ChartServer.model_fields) <= set(ServerSection.model_fields)
    assert set(ChartModel.model_fields) == set(ModelSection.model_fields)
    assert set(ChartGroup.model_fields) == set(GroupSection.model_fields)


def test_the_model_takes_the_defaults() -> None:
    ChartValues.model_validate(defaults())


def test_every_value_is_explained() -> None:
    paths = {row.path for row in readme.rows()}
    assert "router.gpu.count" in paths
    assert "cluster.groups" in paths


def nodes_of(schema: Any, path: str = "") -> Iterator[tuple[str, set[str], dict[str, Any]]]:
    """Of each object in a schema: where it stands, which types it allows, itself."""
    if isinstance(schema, dict):
        types = schema.get("type", ())
        yield path, set([types] if isinstance(types, str) else types), schema
        for key, child in schema.items():
            yield from nodes_of(child, f"{path}/{key}")
    elif isinstance(schema, list):
        for number, child in enumerate(schema):
            yield from nodes_of(child, f"{path}/{number}")


def test_every_object_of_the_schema_is_closed() -> None:
    """But maps whose keys are free: labels, annotations and resources."""
    found = [
        path
        for path, types, node in nodes_of(schema.values_schema())
        if "object" in types and node.get("additionalProperties") is not False and "maxProperties" not in node
    ]
    assert [path for path in found if not re.search(MAPS, path)] == []


def test_every_number_has_both_ends() -> None:
    """But Kubernetes' quantities, which are text as a rule."""
    low, high = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}
    open_ended = [
        path
        for path, types, node in nodes_of(schema.values_schema())
        if types & {"integer", "number"} and not (low & set(node) and high & set(node))
    ]
    assert [path for path in open_ended if "resource.Quantity" not in path] == []


@pytest.mark.vllm
def test_vllms_arguments_are_those_of_the_installed_one() -> None:
    from vllm import AsyncEngineArgs

    fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert set(schema.engine_arguments()) == {name for name in fields if not name.startswith("_")}
