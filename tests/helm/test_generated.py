"""What is generated is up to date, and says what ClusterConfig says."""

from __future__ import annotations

import dataclasses
import re
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

MAPS = r"(nodeSelector|[lL]abels|[aA]nnotations|resources|experts|kwargs)(/anyOf/\d)?$"


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


def test_every_object_of_the_schema_is_closed() -> None:
    """But maps whose keys are free: labels, annotations, resources, and vLLM's own arguments."""
    found: list[str] = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            types = node.get("type", ())
            is_object = "object" in ([types] if isinstance(types, str) else types)
            if is_object and node.get("additionalProperties") is not False and "maxProperties" not in node:
                found.append(path)
            for key, child in node.items():
                walk(child, f"{path}/{key}")
        elif isinstance(node, list):
            for number, child in enumerate(node):
                walk(child, f"{path}/{number}")

    walk(schema.values_schema(), "")
    assert [path for path in found if not re.search(MAPS, path)] == []


def test_every_number_has_both_ends() -> None:
    """But Kubernetes' quantities, which are text as a rule."""
    open_ended: list[str] = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            types = node.get("type", ())
            is_number = {"integer", "number"} & set([types] if isinstance(types, str) else types)
            low, high = {"minimum", "exclusiveMinimum"} & set(node), {"maximum", "exclusiveMaximum"} & set(node)
            if is_number and not (low and high):
                open_ended.append(path)
            for key, child in node.items():
                walk(child, f"{path}/{key}")
        elif isinstance(node, list):
            for number, child in enumerate(node):
                walk(child, f"{path}/{number}")

    walk(schema.values_schema(), "")
    assert [path for path in open_ended if "resource.Quantity" not in path] == []


@pytest.mark.vllm
def test_vllms_arguments_are_those_of_the_installed_one() -> None:
    from vllm import AsyncEngineArgs

    fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert set(schema.engine_arguments()) == {name for name in fields if not name.startswith("_")}
