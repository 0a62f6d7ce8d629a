"""The command line against the session's cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from session_cluster import GROUPS, Cluster

from expertmesh.cluster.processes import running
from expertmesh.cluster.record import Record
from expertmesh.cluster.serve_api import ServeApi

LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
pytestmark = pytest.mark.cluster


def status(cluster: Cluster) -> dict[str, Any]:
    done = cluster.run("status", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_status_is_what_serve_and_the_directory_say(cluster: Cluster) -> None:
    applications = ServeApi(cluster.dashboard, cluster.token).details()["applications"]
    found = status(cluster)
    assert [group["name"] for group in found["groups"]] == list(GROUPS)
    for group in found["groups"]:
        (deployment,) = applications[f"experts-{group['name']}"]["deployments"].values()
        assert group["serve"]["target"] == deployment["target_num_replicas"] == 1
        assert {one["pid"] for one in group["replicas"]} == {one["pid"] for one in deployment["replicas"]}
        assert group["agree"]
        assert set(group["experts"].values()) == {GROUPS[group["name"]]}
    assert found["router"]["status"] == found["directory"]["status"] == "RUNNING"


def test_status_for_people(cluster: Cluster) -> None:
    done = cluster.run("status")
    assert done.returncode == 0
    assert f"{cluster.http}/v1" in done.stdout
    assert "!" not in done.stdout


def test_generate(cluster: Cluster) -> None:
    first = cluster.run("generate", "def main():", "--max-tokens", "8", "--temperature", "0")
    again = cluster.run("generate", "def main():", "--max-tokens", "8", "--temperature", "0")
    assert first.returncode == again.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    chat = cluster.run("generate", "What is 2 + 3?", "--chat", "--max-tokens", "8")
    assert chat.returncode == 0, chat.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["hi", "--model", "nobody"], "nobody"), (["a b " * 2000], "maximum context length")],
)
def test_generate_refused(cluster: Cluster, arguments: list[str], said: str) -> None:
    done = cluster.run("generate", *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert said in line


def test_up_again_leaves_all_processes_alone(cluster: Cluster) -> None:
    before = status(cluster)
    done = cluster.run("up", str(cluster.config), timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert "already running" in done.stderr
    after = status(cluster)
    assert [group["replicas"][0]["pid"] for group in after["groups"]] == [
        group["replicas"][0]["pid"] for group in before["groups"]
    ]


def test_up_with_another_port_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    config = yaml.safe_load(cluster.config.read_text())
    config["server"]["http_port"] = cluster.http_port + 1
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(config))
    done = cluster.run("up", str(changed))
    assert done.returncode == 1
    assert "stop it first with `expertmesh down tests`" in done.stderr


def test_up_with_a_group_that_has_no_room(cluster: Cluster, tmp_path: Path) -> None:
    config = yaml.safe_load(cluster.config.read_text())
    config["groups"][1] |= {"num_gpus": 1, "min_replicas": 2, "max_replicas": 2}
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(config))
    done = cluster.run("up", str(changed))
    assert done.returncode == 1
    assert "group b: 2 replicas x 1 GPU do not fit: the cluster has 0 GPUs" in done.stderr
    assert status(cluster)["groups"][1]["agree"]


def test_only_serve_itself_listens_beyond_loopback(cluster: Cluster) -> None:
    """Ray Serve 2.60 opens its gRPC proxy, and one port of each replica, on all addresses and offers no choice."""
    record = Record.model_validate_json(
        Path(cluster.environment["XDG_STATE_HOME"], "expertmesh/tests/cluster.json").read_bytes()
    )
    beyond: dict[str, list[int]] = {}
    for process in running(str(record.marker)):
        for connection in process.net_connections("inet"):
            if connection.status == "LISTEN" and connection.laddr.ip not in LOOPBACK:
                beyond.setdefault(f"{process.pid} {process.cmdline()[0]}", []).append(connection.laddr.port)
    assert all("ray::ServeReplica" in process or "ray::ProxyActor" in process for process in beyond), beyond
    assert all(len(ports) == 1 for ports in beyond.values()), beyond
    announced = {
        int(one["address"].rpartition(":")[2]) for group in status(cluster)["groups"] for one in group["replicas"]
    }
    assert len(announced) == len(GROUPS)
    assert not announced & {port for ports in beyond.values() for port in ports}
