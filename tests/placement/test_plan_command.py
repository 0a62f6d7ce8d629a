"""`expertmesh plan` as people and programs use it, without a cluster and with the session's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from placement_values import loads_of, zipf
from session_cluster import GROUPS, Cluster
from typer.testing import CliRunner, Result

from expertmesh.artifact.manifest import read_manifest
from expertmesh.cli import app
from expertmesh.config import load_config
from expertmesh.errors import ExpertMeshError
from expertmesh.placement.loads import loads_text
from expertmesh.placement.plan import check_plan, read_plan_file
from expertmesh.placement.planner import NO_COACTIVATION


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)


def run_json(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def config(tmp_path: Path, demo_artifact: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    groups = [{"name": name, "experts": experts} for name, experts in GROUPS.items()]
    path.write_text(yaml.safe_dump({"model": {"artifact": str(demo_artifact)}, "groups": groups}))
    return path


@pytest.fixture
def loads(tmp_path: Path, demo_artifact: Path) -> Path:
    layers = read_manifest(demo_artifact).layers
    path = tmp_path / "loads.json"
    path.write_text(loads_text(loads_of(1000 * zipf(len(layers), 16, 1.0))))
    return path


def test_a_plan_from_config_and_loads(config: Path, loads: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    given = ("--config", str(config), "--loads", str(loads), "--rows-per-replica", "700", "--groups", "4")
    done = run(*given, "-o", str(plan))
    assert done.exit_code == 0
    for words in ("Experts 0.", "today", "this plan", "EPLB (baseline)", "hot-1-"):
        assert words in done.stdout
    read = read_plan_file(plan)
    deployed = load_config(config)
    assert len(check_plan(read, deployed, read_manifest(deployed.model.artifact)).groups) == 4
    found = run_json(*given)
    assert found["plan"] == json.loads(plan.read_text())
    assert found["planned"]["memory_gib"] < found["today"]["memory_gib"]
    assert found["planned"]["replicas"] == found["eplb"]["replicas"]


def test_uniform_loads_of_a_shape() -> None:
    found = run_json("--shape", "deepseek-v3", "--memory-gib", "60")
    assert found["today"] is None
    assert len(found["groups"]) == 11
    assert all(group["memory_gib"] <= 60 for group in found["groups"])
    assert found["planned"]["memory_gib"] == pytest.approx(found["sizing"]["experts_gib"])


def test_an_objective_for_loads_that_hold_no_coactivation(tmp_path: Path) -> None:
    path, loads = tmp_path / "loads.json", zipf(32, 8, 1.0)
    path.write_text(loads_text(loads_of(loads, coactivation={0: ((0, 1, 0.5),)})))
    asked = ("--shape", "mixtral-8x7b", "--objective", "spread")
    assert not run_json(*asked, "--loads", str(path))["remarks"]
    assert not run_json("--shape", "mixtral-8x7b")["remarks"]
    (remark,) = run_json(*asked)["remarks"]
    assert remark == f"objective spread: {NO_COACTIVATION}"
    assert f"! {remark}\n" in run(*asked).stdout


def test_a_modelled_device() -> None:
    given = ("--shape", "mixtral-8x7b", "--tokens-per-s", "5000", "--teraflops", "400", "--memory-gb-per-s", "3350")
    found = run_json(*given)
    assert found["rows_per_replica_source"].startswith("modelled: 400 TFLOP/s and 3350 GB/s")
    assert found["planned"]["busiest"] <= 0.6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shape", "deepseek-v3", "--memory-gib", "1"), "cannot hold one expert of each of 58 layers, 2.38 GiB"),
        (("--shape", "mixtral-8x7b", "--groups", "9"), "9 groups cannot share 8 experts per layer"),
        (("--shape", "mixtral-8x7b", "--config", "x"), "--shape stands for a model that is not here"),
        (("--shape", "mixtral-8x7b", "--teraflops", "1"), "needs both --teraflops and --memory-gb-per-s"),
        (("--shape", "mixtral-8x7b", "--rows-per-replica", "9", "--max-replicas", "1"), "scaling target not reachable"),
        (("--shape", "mixtral-8x7b", "--objective", "gather"), "objective gather: these loads do not tell"),
        (("--shape", "mixtral-8x7b", "-o", "/proc/none/plan.yaml"), "/proc/none/plan.yaml: no such file or directory"),
        (("--artifact", "/absent"), "/absent: no artifact here"),
        (("--directory", "127.0.0.1:9"), "--directory needs --artifact or --config"),
        (("--shape", "mixtral-8x7b", "--directory", "127.0.0.1:9"), "--directory needs --artifact or --config"),
        (("mine", "--directory", "127.0.0.1:9"), "the cluster mine has its own directory"),
        (
            ("--shape", "mixtral-8x7b", "--rows-per-replica", "1e-6", "--tokens-per-s", "1000"),
            "replicas would be needed",
        ),
        (("name", "--artifact", "/absent"), "either the cluster name or --artifact and --config"),
    ],
)
def test_refusals(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ExpertMeshError) as error:
        run(*arguments)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_loads_of_another_model(config: Path, tmp_path: Path) -> None:
    loads, plan = tmp_path / "loads.json", tmp_path / "plan.yaml"
    loads.write_text(loads_text(loads_of(zipf(2, 8, 1.0))))
    command = [sys.executable, "-m", "expertmesh", "plan", "--config", config, "--loads", loads, "-o", plan]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120, check=False)
    assert done.returncode == 1 and not plan.exists()
    assert done.stderr.startswith(f"expertmesh: {loads}: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("--groups", "0"), ("--objective", "x"), ("--growth", "0.5"), ("--window", "0")])
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run("--shape", "mixtral-8x7b", *arguments).exit_code == 2


@pytest.mark.cluster
def test_loads_of_the_running_cluster(cluster: Cluster, demo_artifact: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    asked = cluster.run("generate", "12+34=", "--max-tokens", "8")
    assert asked.returncode == 0, asked.stderr
    done = cluster.run("plan", "tests", "--window", "600", "--groups", "3", "-o", str(plan), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["loads"].startswith("observed over ")
    assert len(read_plan_file(plan).groups) == 3
    assert found["today"]["replicas"] >= 4
    elsewhere = ("--artifact", str(demo_artifact), "--directory", cluster.directory, "--window", "600")
    done = cluster.run("plan", *elsewhere, "--groups", "3", "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert again["loads"].startswith("observed over ") and again["today"] is None
    assert again["planned"]["replicas"] > 0
