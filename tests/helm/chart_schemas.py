"""Validators of what the chart renders: Kubernetes' own schemas, strict, and KubeRay's CRD with closed objects."""

from __future__ import annotations

import copy
import functools
import importlib.resources
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import pytest
import referencing
import yaml
from kubernetes_testbed import CRDS

SCHEMAS = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
VERSIONS = [f"1.{minor}" for minor in range(27, 38)]
CUSTOM = ("cert-manager.io/v1", "gateway.networking.k8s.io/v1", "monitoring.coreos.com/v1")
"""Of other projects: their schemas are not here, so that only Helm and tests of their own look at them."""
CHECKED: Counter[str] = Counter()
"""What this session has checked, for its summary."""
Manifest = dict[str, Any]


def check(objects: Sequence[Manifest], version: str) -> int:
    """Checks each object and returns how many had a schema; fails the test with the first fault and where it is."""
    checked = 0
    for one in objects:
        if one["apiVersion"] in CUSTOM:
            continue
        validator = rayservice() if one["kind"] == "RayService" else builtin(one["apiVersion"], one["kind"], version)
        fault = jsonschema.exceptions.best_match(validator.iter_errors(one))
        if fault is not None:
            pytest.fail(f"{version}: {one['kind']} {one['metadata']['name']}: {fault.json_path}: {fault.message[:400]}")
        checked += 1
    CHECKED.update(renders=1, objects=checked)
    return checked


@functools.cache
def builtin(api_version: str, kind: str, version: str) -> jsonschema.Draft202012Validator:
    """Of one of Kubernetes' own kinds, in which no unknown key passes."""
    group = re.sub(r"^([^./]*)(\.[^/]*)?/", r"\1-", api_version)
    folder = SCHEMAS / f"v{version}.0-local-strict"
    schema = json.loads((folder / f"{kind.lower()}-{group}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=_definitions(version))


@functools.cache
def _definitions(version: str) -> referencing.Registry[Any]:
    definitions = json.loads((SCHEMAS / f"v{version}.0-local-strict" / "_definitions.json").read_text())
    registry: referencing.Registry[Any] = referencing.Registry()
    return referencing.Resource.from_contents(definitions) @ registry


@functools.cache
def rayservice() -> jsonschema.Draft202012Validator:
    """Of KubeRay's RayService; the CRD itself lets unknown keys pass."""
    path = CRDS / "ray.io_rayservices.yaml"
    if not path.exists():
        pytest.skip("../shared/crds, KubeRay's CRDs, is not beside the checkout")
    crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (one for one in crd["spec"]["versions"] if one["name"] == "v1")
    schema = copy.deepcopy(version["schema"]["openAPIV3Schema"])
    for node in list(_nodes(schema)):
        _as_json_schema(node)
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """All schemas within, itself included."""
    yield schema
    for child in schema.get("properties", {}).values():
        yield from _nodes(child)
    for key in ("items", "additionalProperties", "not"):
        if isinstance(schema.get(key), dict):
            yield from _nodes(schema[key])
    for key in ("allOf", "anyOf", "oneOf"):
        for child in schema.get(key, ()):
            yield from _nodes(child)


def _as_json_schema(node: dict[str, Any]) -> None:
    if node.pop("x-kubernetes-int-or-string", False):
        node.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if node.pop("nullable", False) and "type" in node:
        node["type"] = [node["type"], "null"]
    keeps_unknown = node.pop("x-kubernetes-preserve-unknown-fields", False)
    for key in [key for key in node if key.startswith("x-kubernetes-")]:
        del node[key]
    if "properties" in node and not keeps_unknown:
        node.setdefault("additionalProperties", False)
