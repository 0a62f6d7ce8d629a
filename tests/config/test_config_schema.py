"""The published JSON Schema is the code's, and it knows good from bad as the code does."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from expertmesh.commands.config_schema import schema_text

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs" / "cluster-config.schema.json"


def test_the_committed_copy_is_current() -> None:
    hint = "run `expertmesh config-schema > docs/cluster-config.schema.json`"
    assert PUBLISHED.read_text() == schema_text(), hint


def test_the_demo_config_is_valid() -> None:
    jsonschema.validate(yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text()), json.loads(schema_text()))


def test_an_unknown_key_is_not() -> None:
    with pytest.raises(jsonschema.ValidationError, match="modell"):
        jsonschema.validate({"model": {"artifact": "a"}, "groups": [], "modell": 1}, json.loads(schema_text()))
