"""`expertmesh rebalance` on the session's Ray cluster, under load."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from session_cluster import GROUPS, Cluster

from benchmarks.rebalance import Run, load
from examples import demo
from expertmesh.artifact.manifest import read_manifest
from expertmesh.cluster.record import Record

pytestmark = pytest.mark.cluster
AFTER = {"a": "0-3", "b": "4-7", "c": "8-15"}


@pytest.fixture
def plan(cluster: Cluster, demo_artifact: Path, tmp_path: Path) -> Iterator[Path]:
    yield write_plan(tmp_path / "plan.json", demo_artifact, AFTER)
    if set(groups(cluster)) != set(GROUPS):  # whatever failed, the other tests want their groups
        cluster.run("up", str(cluster.config), timeout_s=300)


def write_plan(path: Path, artifact: Path, experts: dict[str, str]) -> Path:
    sections = [{"name": name, "experts": held} for name, held in experts.items()]
    path.write_text(json.dumps({"fingerprint": read_manifest(artifact).fingerprint, "groups": sections}))
    return path


def groups(cluster: Cluster) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in json.loads(cluster.run("status", "--json").stdout)["groups"]}


def state_file(cluster: Cluster, name: str) -> Path:
    return Path(cluster.environment["XDG_STATE_HOME"], "expertmesh/tests", name)


def under_load(cluster: Cluster, plan: Path) -> tuple[Run, dict[str, Any]]:
    """What the clients saw, and what the command said, while the plan was applied."""
    record = Record.model_validate_json(state_file(cluster, "cluster.json").read_bytes())
    said: dict[str, Any] = {}

    async def change() -> None:
        command = ("rebalance", str(plan), "--cluster", "tests", "--yes", "--json")
        done = await asyncio.to_thread(cluster.run, *command, timeout_s=300)
        assert done.returncode == 0, done.stderr
        said.update(json.loads(done.stdout))

    return asyncio.run(load(record, demo.prompts()[:8], change())), said


def test_there_and_back_without_a_failed_request(cluster: Cluster, plan: Path) -> None:
    before = groups(cluster)
    run, said = under_load(cluster, plan)
    assert not run.failures and run.tokens
    assert said["outcome"] == "done" and said["kept"] == ["a", "b"]
    (renamed,) = said["added"]
    assert said["renamed"] == {"c": renamed} and said["removed"] == ["c", "d"]
    after = groups(cluster)
    assert set(after) == {"a", "b", renamed}
    for name in ("a", "b"):
        assert after[name]["replicas"][0]["pid"] == before[name]["replicas"][0]["pid"]
    run, said = under_load(cluster, state_file(cluster, "plan-before.json"))
    assert not run.failures and run.tokens
    assert set(groups(cluster)) == set(GROUPS) and all(one["agree"] for one in groups(cluster).values())


def test_dry_run_changes_nothing(cluster: Cluster, plan: Path) -> None:
    before = groups(cluster)
    done = cluster.run("rebalance", str(plan), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "start c-" in done.stdout and "remove c, d" in done.stdout and "replicas" in done.stdout
    after = groups(cluster)
    assert {name: one["replicas"][0]["pid"] for name, one in after.items()} == {
        name: one["replicas"][0]["pid"] for name, one in before.items()
    }


def test_refusals_are_one_line(cluster: Cluster, plan: Path, demo_artifact: Path, tmp_path: Path) -> None:
    short = write_plan(tmp_path / "short.json", demo_artifact, {"a": "0-14"})
    for arguments, problem in (
        ([str(plan)], "say --yes"),
        ([str(short), "--yes"], "expert 15 is in no group"),
        (["--resume"], "no rebalance of tests is unfinished"),
        (["--abort"], "no rebalance of tests is unfinished"),
        ([str(tmp_path / "nowhere.json"), "--yes"], "no such file"),
    ):
        done = cluster.run("rebalance", *arguments)
        (line,) = done.stderr.strip().splitlines()
        assert done.returncode == 1 and problem in line
    assert set(groups(cluster)) == set(GROUPS)
