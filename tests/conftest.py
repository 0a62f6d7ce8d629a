"""The session's one Ray cluster: the demo model, brought up by `expertmesh up` as a user would."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from session_cluster import DEMO_CHECKPOINT, GROUPS, START_TIMEOUT_S, Cluster, expertmesh

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    RAY_USAGE_STATS_ENABLED="0",
    # what Ray reads when it is imported: that its head is on 127.0.0.1, and how to be let in
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # as a shell's `&` leaves it, and all processes of the tests with it, of which some are to be interrupted
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The session's cluster comes last: until then what measures time has the cores to itself."""
    items.sort(key=lambda item: "cluster" in getattr(item, "fixturenames", ()))


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
        "engine": {"max_model_len": 512, "kv_cache_gib": 0.25, "wait_for_experts_s": 120, "checksums": True},
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

    ray.init(address=cluster.gcs, _node_ip_address="127.0.0.1", log_to_driver=False, configure_logging=False)
    yield cluster
    ray.shutdown()
