"""`values.schema.json`: every object closed, with ranges, and Kubernetes' own types taken from its schemas."""

from __future__ import annotations

import ast
import importlib.resources
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.chart.values import KUBERNETES_TYPE, NETWORK, ChartValues

ENGINE_ARGUMENTS = ("EngineArgs", "AsyncEngineArgs")
KUBERNETES = "v1.37.0-local-strict"
"""The newest: what an older one does not know is refused by its API server."""
Schema = dict[str, Any]
INDICES = r"^\s*[0-9]+(-[0-9]+)?(\s*,\s*[0-9]+(-[0-9]+)?)*\s*$"
"""As `expertmesh.experts.parse_indices` takes them."""
INDEX = {"minimum": 0, "maximum": 2**20 - 1}
SELECTS = ["In", "NotIn", "Exists", "DoesNotExist"]
API_SERVERS: dict[str, dict[str, Schema]] = {
    "io.k8s.api.core.v1.Toleration": {
        "effect": {"enum": ["", "NoSchedule", "PreferNoSchedule", "NoExecute", None]},
        "operator": {"enum": ["", "Exists", "Equal", "Lt", "Gt", None]},
        "tolerationSeconds": {"minimum": 0, "maximum": 2**31},
    },
    "io.k8s.api.core.v1.TopologySpreadConstraint": {
        "maxSkew": {"minimum": 1, "maximum": 10_000},
        "minDomains": {"minimum": 1, "maximum": 10_000},
        "nodeAffinityPolicy": {"enum": ["Honor", "Ignore", None]},
        "nodeTaintsPolicy": {"enum": ["Honor", "Ignore", None]},
        "whenUnsatisfiable": {"enum": ["DoNotSchedule", "ScheduleAnyway"]},
    },
    "io.k8s.api.core.v1.NodeSelectorRequirement": {"operator": {"enum": [*SELECTS, "Gt", "Lt"]}},
    "io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelectorRequirement": {"operator": {"enum": SELECTS}},
    "io.k8s.api.core.v1.PreferredSchedulingTerm": {"weight": {"minimum": 1, "maximum": 100}},
    "io.k8s.api.core.v1.WeightedPodAffinityTerm": {"weight": {"minimum": 1, "maximum": 100}},
    "io.k8s.api.core.v1.EnvVar": {"name": {"pattern": r"^[-._a-zA-Z][-._a-zA-Z0-9]*$"}},
    "io.k8s.api.networking.v1.IPBlock": {"cidr": {"pattern": NETWORK}},
}
"""What Kubernetes' schemas leave to the API server, which sees pods of a RayService only once KubeRay makes them."""


def values_schema() -> Schema:
    """JSON Schema (2020-12) of the chart's values.

    Values that a user leaves out come from values.yaml, so that only what has no default there is required.
    """
    schema: Schema = ChartValues.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    for definition in (schema, *definitions.values()):
        definition.pop("description", None)  # docstrings of the models; users read values.yaml
    _allow_numbers(definitions["ChartGroup"]["properties"]["experts"])
    # not `propertyNames`: where one is wrong, Helm names some other place
    arguments: Schema = {"properties": {name: {} for name in engine_arguments()}, "additionalProperties": False}
    definitions["EngineSection"]["properties"]["kwargs"] |= arguments
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
            one["patternProperties"] = {INDICES: {"type": ["string", "integer"], "pattern": INDICES} | INDEX}
            one["additionalProperties"] = False
        else:
            one["pattern"] = INDICES
    experts["anyOf"].append({"type": "integer"} | INDEX)


def engine_arguments() -> list[str]:
    """vLLM's, read from its source: importing it takes long."""
    (folder,) = importlib.util.find_spec("vllm").submodule_search_locations  # type: ignore[union-attr, misc]
    tree = ast.parse((Path(folder) / "engine" / "arg_utils.py").read_text())
    classes = [one for one in tree.body if isinstance(one, ast.ClassDef) and one.name in ENGINE_ARGUMENTS]
    fields = [one.target for each in classes for one in each.body if isinstance(one, ast.AnnAssign)]
    names = {field.id for field in fields if isinstance(field, ast.Name)}
    return sorted(name for name in names if not name.startswith("_"))


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
            for key, more in API_SERVERS.get(name, {}).items():
                copied["properties"][key] |= more
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
