"""Validators of what the chart renders: Kubernetes' own schemas, strict, and CRDs', in which objects are closed too.

CRDs are KubeRay's, and those that `tools/kubernetes-tools` fetches: of cert-manager 1.17.1, of the Prometheus operator
0.80.1 and of Gateway API 1.0.0 (experimental channel). They refuse null too, which an API server drops: a key without a
value is a template's mistake. Rules in CEL (`x-kubernetes-validations`) and those of webhooks are not evaluated.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources.abc import Traversable
from typing import Any

import jsonschema
import pytest
import referencing
import yaml
from kubernetes_testbed import CRDS, TOOLS, absent

SCHEMAS = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
OBJECT_META = "https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
VERSIONS = [f"1.{minor}" for minor in range(27, 38)]
CHECKED: Counter[str] = Counter()
"""What this session has checked, for its summary."""
Manifest = dict[str, Any]


def check(objects: Sequence[Manifest], version: str) -> None:
    """Checks each object; fails the test with the first fault and where it is, or with the kind that has no schema."""
    for one in objects:
        fault = jsonschema.exceptions.best_match(validator(one["apiVersion"], one["kind"], version).iter_errors(one))
        if fault is not None:
            pytest.fail(f"{version}: {one['kind']} {one['metadata']['name']}: {fault.json_path}: {fault.message[:400]}")
    CHECKED.update(renders=1, objects=len(objects))


@functools.cache
def validator(api_version: str, kind: str, version: str) -> jsonschema.Draft202012Validator:
    """Of one kind, in which no unknown key passes; `version` is Kubernetes'."""
    builtin = _builtin(api_version, kind, version)
    schema = json.loads(builtin.read_text()) if builtin.is_file() else _custom(api_version, kind)
    return jsonschema.Draft202012Validator(schema, registry=_definitions(version))


def _builtin(api_version: str, kind: str, version: str) -> Traversable:
    """The file of one of Kubernetes' own kinds."""
    group = re.sub(r"^([^./]*)(\.[^/]*)?/", r"\1-", api_version)
    return SCHEMAS / f"v{version}.0-local-strict" / f"{kind.lower()}-{group}.json"


@functools.cache
def _definitions(version: str) -> referencing.Registry[Any]:
    definitions = json.loads((SCHEMAS / f"v{version}.0-local-strict" / "_definitions.json").read_text())
    registry: referencing.Registry[Any] = referencing.Registry()
    return referencing.Resource.from_contents(definitions) @ registry


@functools.cache
def _custom(api_version: str, kind: str) -> Manifest:
    """Of a CRD; CRDs themselves let unknown keys pass."""
    schema = _rayservice() if (api_version, kind) == ("ray.io/v1", "RayService") else _fetched(api_version, kind)
    for node in list(_nodes(schema)):
        _as_json_schema(node)
    schema["properties"]["metadata"] = {"$ref": OBJECT_META}
    return schema


def _rayservice() -> Manifest:
    path = CRDS / "ray.io_rayservices.yaml"
    if not path.exists():
        absent("../shared/crds, KubeRay's CRDs, is not beside the checkout")
    crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (one for one in crd["spec"]["versions"] if one["name"] == "v1")
    schema: Manifest = version["schema"]["openAPIV3Schema"]
    return schema


def _fetched(api_version: str, kind: str) -> Manifest:
    folder = TOOLS / "schemas"
    if not folder.exists():
        absent(f"no schemas of other projects' kinds in {folder}; tools/kubernetes-tools puts them there")
    path = folder / api_version / f"{kind}.json"
    if not path.exists():
        pytest.fail(
            f"no schema of {api_version} {kind}: neither Kubernetes' nor of what tools/kubernetes-tools fetches"
        )
    schema: Manifest = json.loads(path.read_text())
    return schema


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """All schemas within, itself included."""
    yield schema
    for key in ("properties", "$defs"):
        for child in schema.get(key, {}).values():
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
