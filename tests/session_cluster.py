"""The session's one Ray cluster, as tests see it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEMO_CHECKPOINT = ROOT / "examples" / "demo_model" / "checkpoint"
GROUPS = {"a": "0-3", "b": "4-7", "c": "8-11", "d": "12-15"}
START_TIMEOUT_S = 600


@dataclass(frozen=True)
class Cluster:
    """A running cluster with the demo model in four groups of four experts."""

    config: Path
    environment: dict[str, str]
    """For `expertmesh`, so that it finds this cluster and no other."""
    http: str
    """URL of the OpenAI API, without /v1."""
    http_port: int
    grpc_port: int
    dashboard: str
    token: str
    gcs: str
    """host:port that `ray.init` takes."""
    model: str

    @property
    def directory(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def run(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """The command line, run as a user would."""
        return expertmesh(*arguments, environment=self.environment, timeout_s=timeout_s)


def expertmesh(
    *arguments: str, environment: dict[str, str], timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "expertmesh", *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
