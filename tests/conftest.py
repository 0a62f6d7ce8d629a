"""The session's one Ray cluster: the demo model, brought up by `expertmesh up` as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEMO_CHECKPOINT = ROOT / "examples" / "demo_model" / "checkpoint"
GROUPS = {"a": "0-3", "b": "4-7", "c": "8-11", "d": "12-15"}
START_TIMEOUT_S = 600

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    RAY_USAGE_STATS_ENABLED="0",
    # so that Ray, which reads it when it is imported, looks for its head on 127.0.0.1
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
)


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


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from expertmesh.artifact.prepare import prepare

    artifact = tmp_path_factory.mktemp("demo") / "demo.artifact"
    prepare(DEMO_CHECKPOINT, artifact)
    return artifact


@pytest.fixture(scope="session")
def cluster(demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    from expertmesh.cluster.local_ray import free_ports
    from expertmesh.cluster.record import Record

    folder = tmp_path_factory.mktemp("cluster")
    http_port, grpc_port = free_ports(2)
    config = folder / "cluster.yaml"
    described = {
        "name": "tests",
        "model": {"artifact": str(demo_artifact), "name": "demo"},
        "engine": {"max_model_len": 512, "kv_cache_gib": 0.25, "wait_for_experts_s": 120},
        "groups": [{"name": name, "experts": experts} for name, experts in GROUPS.items()],
        "server": {"http_port": http_port, "grpc_port": grpc_port},
    }
    config.write_text(yaml.safe_dump(described))
    environment = os.environ | {"XDG_STATE_HOME": str(folder / "state")}
    try:
        done = expertmesh("up", str(config), environment=environment, timeout_s=START_TIMEOUT_S)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        record = Record.model_validate_json((folder / "state/expertmesh/tests/cluster.json").read_bytes())
        gcs = next(Path(str(record.temp_dir)).glob("ray_current_cluster")).read_text().strip()
        yield Cluster(
            config, environment, record.http, http_port, grpc_port, record.dashboard, str(record.token), gcs, "demo"
        )
    finally:
        expertmesh("down", "tests", environment=environment)


@pytest.fixture(scope="session")
def ray_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with this process connected to its Ray, for tests that deploy applications of their own."""
    import ray

    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
    ray.init(address=cluster.gcs, _node_ip_address="127.0.0.1", log_to_driver=False, configure_logging=False)
    yield cluster
    ray.shutdown()
