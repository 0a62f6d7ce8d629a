"""The rendered examples, committed so that a change of the chart shows in a diff what it changes."""

from __future__ import annotations

import re
from pathlib import Path

from tools.chart.helm import CHART, ROOT, objects, template

FOLDER = ROOT / "tests" / "helm" / "golden"
KUBE_VERSION = "1.37.0"
GENERATED = "Z2VuZXJhdGVk"
"""Base64 of `generated`: stands for keys and certificates, which are new each time."""


def examples() -> list[Path]:
    return sorted(CHART.glob("examples/*.yaml"))


def text(example: Path) -> str:
    """What Helm renders of an example, without generated secrets."""
    rendered = template(example, release=example.stem.split("-")[0], namespace="expertmesh", kube_version=KUBE_VERSION)
    for secret in (one for one in objects(rendered) if one["kind"] == "Secret"):
        for key in secret["data"]:
            rendered = re.sub(rf"(?m)^  {re.escape(key)}: .*$", f"  {key}: {GENERATED}", rendered)
    return rendered
