"""The command line without a cluster: help, wrong usage, and errors as one line."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from certificates import Authority
from typer.testing import CliRunner

import expertmesh
from expertmesh.cli import app

COMMANDS = ("up", "down", "status", "top", "plan", "rebalance", "simulate", "generate", "prepare", "config-schema")


def run(home: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "expertmesh", *arguments],
        env=os.environ | {"XDG_STATE_HOME": str(home), "NO_COLOR": "1", "COLUMNS": "120"},
        cwd=Path(expertmesh.__file__).parents[1],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Its one line on stderr."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("expertmesh: ")
    return line


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"])
    assert done.exit_code == 0
    assert "Example: expertmesh" in plain(done.output)


def test_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"expertmesh {expertmesh.__version__}\n")


@pytest.mark.parametrize(
    "arguments", [["up"], ["nonsense"], ["prepare", "only-one"], ["generate", "x", "--max-tokens", "0"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_nothing_runs(tmp_path: Path) -> None:
    assert "no cluster is known here" in refusal(run(tmp_path, "status"))
    assert "no cluster 'x' is known here" in refusal(run(tmp_path, "generate", "hi", "--cluster", "x"))
    down = run(tmp_path, "down")
    assert (down.returncode, down.stderr) == (0, "no cluster is running\n")


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    record = tmp_path / "expertmesh" / "x" / "cluster.json"
    record.parent.mkdir(parents=True)
    record.write_text("{")
    assert str(record) in refusal(run(tmp_path, "status", "x"))


def test_several_clusters_and_no_name(tmp_path: Path) -> None:
    for name in ("x", "y"):
        folder = tmp_path / "expertmesh" / name
        folder.mkdir(parents=True)
        (folder / "cluster.json").write_text("{}")
    assert refusal(run(tmp_path, "down")).endswith("name one: x, y")


def test_up_with_a_config_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(run(tmp_path, "up", "/absent.yaml")) == "expertmesh: /absent.yaml: no such file or directory"


def test_up_without_an_artifact(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: {artifact: nowhere}\ngroups: [{name: a, experts: 0-3}]\n")
    assert f"{tmp_path / 'nowhere'}: no artifact here" in refusal(run(tmp_path, "up", str(config)))
    assert not (tmp_path / "expertmesh").exists()


@pytest.mark.parametrize("key", ["http_port", "grpc_port", "grpc_tls_port"])
def test_up_on_a_port_in_use(tmp_path: Path, demo_artifact: Path, key: str) -> None:
    tls = Authority(tmp_path).issue() if key == "grpc_tls_port" else None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = tmp_path / "c.yaml"
        described = {
            "model": {"artifact": str(demo_artifact)},
            "groups": [{"name": "a", "experts": "0-15"}],
            "server": {"http_port": 18761, "grpc_port": 18762, key: port},
            "security": {"tls": tls and tls.model_dump(mode="json")},
        }
        config.write_text(yaml.safe_dump(described))
        assert f"server.{key}: port {port} is in use" in refusal(run(tmp_path, "up", str(config)))
    assert not (tmp_path / "expertmesh").exists()


def test_up_with_tls_files_that_are_not_there(tmp_path: Path, demo_artifact: Path) -> None:
    config = tmp_path / "c.yaml"
    described = {
        "model": {"artifact": str(demo_artifact)},
        "groups": [{"name": "a", "experts": "0-15"}],
        "security": {"tls": {"ca": "ca.pem", "certificate": "c.pem", "key": "k.pem"}},
    }
    config.write_text(yaml.safe_dump(described))
    said = f"expertmesh: security.tls.ca: {tmp_path / 'ca.pem'}: no such file or directory"
    assert refusal(run(tmp_path, "up", str(config))) == said
    assert not (tmp_path / "expertmesh").exists()


def test_up_with_experts_that_nobody_serves(tmp_path: Path, demo_artifact: Path) -> None:
    config = tmp_path / "c.yaml"
    groups = [{"name": "a", "experts": "0-11"}]
    config.write_text(yaml.safe_dump({"model": {"artifact": str(demo_artifact)}, "groups": groups}))
    assert "layer 0: experts 12-15 are in no group" in refusal(run(tmp_path, "up", str(config)))


def test_generate_where_nothing_listens(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/v1"
    assert url in refusal(run(tmp_path, "generate", "hi", "--url", url, "--model", "m"))
    assert "--url needs --model" in refusal(run(tmp_path, "generate", "hi", "--url", url))


def test_prepare_of_no_checkpoint(tmp_path: Path) -> None:
    assert "absent" in refusal(run(tmp_path, "prepare", str(tmp_path / "absent"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
