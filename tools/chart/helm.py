"""Helm as generators and tests use it: offline, with the API versions of a cluster that has all the chart knows."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "expertmesh"
API_VERSIONS = (
    "ray.io/v1/RayService",
    "cert-manager.io/v1/Certificate",
    "gateway.networking.k8s.io/v1/HTTPRoute",
    "monitoring.coreos.com/v1/PodMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
)
Manifest = dict[str, Any]


class HelmError(Exception):
    """What Helm said."""


def tool(name: str) -> Path | None:
    """A program that `tools/kubernetes-tools` has fetched, or else of the PATH."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    fetched = cache / "expertmesh" / "kubernetes" / "bin" / name
    if fetched.exists():
        return fetched
    found = shutil.which(name)
    return Path(found) if found else None


def helm(*arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = 120) -> str:
    """Runs Helm and returns what it printed; raises HelmError with all that it said."""
    program = tool("helm")
    if program is None:
        raise HelmError("helm is neither in the cache of tools/kubernetes-tools nor on the PATH")
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
    )
    if done.returncode:
        raise HelmError(f"{done.stdout}{done.stderr}".strip())
    return done.stdout


def template(
    *values: Path,
    chart: Path = CHART,
    release: str = "demo",
    namespace: str = "default",
    settings: Mapping[str, str] | None = None,
    kube_version: str | None = None,
    api_versions: Iterable[str] = API_VERSIONS,
) -> str:
    """What `helm template` renders; settings are `--set` pairs."""
    arguments = ["template", release, str(chart), "--namespace", namespace]
    for file in values:
        arguments += ["--values", str(file)]
    for key, value in (settings or {}).items():
        arguments += ["--set", f"{key}={value}"]
    for version in api_versions:
        arguments += ["--api-versions", version]
    if kube_version:
        arguments += ["--kube-version", kube_version]
    return helm(*arguments)


def objects(rendered: str) -> list[Manifest]:
    return [one for one in yaml.load_all(rendered, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if one]


def values_files() -> list[Path]:
    """All committed values files."""
    return sorted([*CHART.glob("ci/*.yaml"), *CHART.glob("examples/*.yaml")])
