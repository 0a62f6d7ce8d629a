"""`expertmesh config-schema`: the JSON Schema of the cluster config."""

from __future__ import annotations

import json

import typer

from expertmesh.config import ClusterConfig


def config_schema() -> None:
    """Print the JSON Schema of the cluster config.

    Example: expertmesh config-schema > docs/cluster-config.schema.json
    """
    typer.echo(schema_text(), nl=False)


def schema_text() -> str:
    return json.dumps(ClusterConfig.model_json_schema(), indent=2) + "\n"
