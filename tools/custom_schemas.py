"""custom_schemas.py FOLDER HTTPROUTE_JS: writes FOLDER/API_VERSION/KIND.json, schemas of the CRDs of other projects.

What is at hand was generated from the CRDs: pydantic models of cert-manager's and of the Prometheus operator's, and a
JavaScript module that holds Gateway API's. Both add null to what a CRD leaves optional; that is taken away again.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from cloudcoil.models.cert_manager.v1 import Certificate, Issuer
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

NULL = {"type": "null"}


def main() -> None:
    folder, httproute_js = map(Path, sys.argv[1:])
    schemas = [model.model_json_schema() for model in (Issuer, Certificate, PodMonitor, PrometheusRule)]
    literal = re.search(r"^const schema = (\{.*?^\});$", httproute_js.read_text(), re.MULTILINE | re.DOTALL)
    assert literal is not None, f"{httproute_js} has no schema"
    schemas.append(json.loads(literal[1]))
    for schema in map(_without_null, schemas):
        api_version, kind = (_only(schema["properties"][key]) for key in ("apiVersion", "kind"))
        path = folder / api_version / f"{kind}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(schema, indent=1))


def _only(schema: dict[str, Any]) -> str:
    (value,) = schema.get("enum") or [schema["const"]]
    return str(value)


def _without_null(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_null(child) for child in node]
    if not isinstance(node, dict):
        return node
    if node.get("nullable") is True:
        node = {key: child for key, child in node.items() if key != "nullable"}
    if NULL in (choices := node.get("anyOf", ())):
        rest = [choice for choice in choices if choice != NULL]
        node = {key: child for key, child in node.items() if key not in ("anyOf", "default")}
        node |= rest[0] if len(rest) == 1 else {"anyOf": rest}
    return {key: _without_null(child) for key, child in node.items()}


main()
