"""`values.schema.json`: every object closed, with ranges, and Kubernetes' own types taken from its schemas."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from typing import Any

from tools.chart.values import KUBERNETES_TYPE, ChartValues

KUBERNETES = "v1.37.0-local-strict"
"""The newest: what an older one does not know is refused by its API server."""
Schema = dict[str, Any]


def values_schema() -> Schema:
    """JSON Schema (2020-12) of the chart's values.

    Values that a user leaves out come from values.yaml, so that only what has no default there is required.
    """
    schema: Schema = ChartValues.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    for definition in (schema, *definitions.values()):
        definition.pop("description", None)  # docstrings of the models; users read values.yaml
    _allow_numbers(definitions["ChartGroup"]["properties"]["experts"])
    definitions["EngineSection"]["properties"]["kwargs"] |= {"additionalProperties": True}
    _add_kubernetes(schema)
    _drop_titles(schema)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Values of the chart expertmesh"
    schema["properties"]["global"] = {
        "type": "object",
        "description": "Of a parent chart; not used.",
        "maxProperties": 0,
    }
    return schema


def text() -> str:
    return json.dumps(values_schema(), indent=1) + "\n"


def _allow_numbers(experts: Schema) -> None:
    """Helm reads `experts: 3` as a number."""
    for one in list(experts["anyOf"]):
        if one["type"] == "object":
            one["additionalProperties"] = {"type": ["string", "integer"]}
            one["propertyNames"] = {"pattern": "^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$"}
    experts["anyOf"].append({"type": "integer", "minimum": 0})


def _add_kubernetes(schema: Schema) -> None:
    """Copies the types that references name, and those that they name, into `$defs`."""
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / KUBERNETES
    known: dict[str, Schema] = json.loads((folder / "_definitions.json").read_text())["$defs"]
    waiting = list(_nodes_with(schema, KUBERNETES_TYPE))
    while waiting:
        reference = waiting.pop()
        name = reference.pop(KUBERNETES_TYPE, None) or reference["$ref"].rpartition("/")[2]
        reference["$ref"] = f"#/$defs/{name}"
        if name not in schema["$defs"]:
            copied = json.loads(json.dumps(known[name]))
            _drop_descriptions(copied)
            schema["$defs"][name] = copied
            waiting.extend(_nodes_with(copied, "$ref"))


def _nodes_with(node: object, key: str) -> Iterator[Schema]:
    if isinstance(node, dict):
        if isinstance(node.get(key), str):
            yield node
        for child in node.values():
            yield from _nodes_with(child, key)
    elif isinstance(node, list):
        for child in node:
            yield from _nodes_with(child, key)


def _drop_descriptions(node: object) -> None:
    """Kubernetes' descriptions would make up most of the file."""
    if isinstance(node, dict):
        if isinstance(node.get("description"), str):
            del node["description"]
        for key in [key for key in node if key.startswith("x-kubernetes-")]:
            del node[key]
        for child in node.values():
            _drop_descriptions(child)
    elif isinstance(node, list):
        for child in node:
            _drop_descriptions(child)


def _drop_titles(node: object) -> None:
    """Pydantic's titles repeat the keys."""
    if isinstance(node, dict):
        if isinstance(node.get("title"), str):
            del node["title"]
        for child in node.values():
            _drop_titles(child)
    elif isinstance(node, list):
        for child in node:
            _drop_titles(child)
