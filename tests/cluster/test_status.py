"""`status` during load, against Ray Serve's own word; and the directory's restart, which nobody notices."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from session_cluster import GROUPS, Cluster

pytestmark = pytest.mark.cluster


@contextmanager
def load(cluster: Cluster, streams: int = 2) -> Iterator[list[str]]:
    """Requests one after another, `streams` at a time, until the block ends; yields the texts so far."""
    client = openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0, timeout=180)
    over, texts, errors = threading.Event(), list[str](), list[Exception]()

    def ask() -> None:
        while not over.is_set():
            try:
                done = client.completions.create(model="demo", prompt="import ", max_tokens=32, temperature=0)
            except openai.OpenAIError as error:
                errors.append(error)
                return
            texts.append(done.choices[0].text)

    threads = [threading.Thread(target=ask) for _ in range(streams)]
    for thread in threads:
        thread.start()
    try:
        yield texts
    finally:
        over.set()
        for thread in threads:
            thread.join(180)
    assert errors == []


def status(cluster: Cluster) -> dict[str, Any]:
    done = cluster.run("status", "--json")
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def serve_details(cluster: Cluster) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {cluster.token}"}
    details: dict[str, Any] = httpx.get(f"{cluster.dashboard}/api/serve/applications/", headers=headers).json()
    return details["applications"]


def wait_until(condition: Any, what: str, timeout_s: float = 120) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def test_status_during_load_matches_ray_serve(cluster: Cluster) -> None:
    with load(cluster) as texts:
        wait_until(lambda: len(texts) >= 4, "answers")
        told = status(cluster)
    serve = serve_details(cluster)
    assert {group["name"] for group in told["groups"]} == set(GROUPS)
    for group in told["groups"]:
        replicas = serve[f"experts-{group['name']}"]["deployments"]["ExpertReplica"]["replicas"]
        running = [one for one in replicas if one["state"] == "RUNNING"]
        assert group["serve"]["running"] == group["ready"] == len(running) == 1
        assert group["agree"] is True
        assert {one["pid"] for one in group["replicas"]} == {one["pid"] for one in running}
        assert set(group["experts"].values()) == {GROUPS[group["name"]]}
        assert group["rows_total"] > 0
    assert sum(group["rows_per_s"] for group in told["groups"]) > 0
    assert told["router"]["status"] == "RUNNING"


def test_generate_streams_from_the_shell(cluster: Cluster) -> None:
    done = cluster.run("generate", "def add(a, b):", "--max-tokens", "16", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_directory_restarts_without_a_failed_or_different_request(cluster: Cluster) -> None:
    before = status(cluster)

    def directory_pid() -> int | None:
        replicas = serve_details(cluster)["directory"]["deployments"]["Directory"]["replicas"]
        return next((one["pid"] for one in replicas if one["state"] == "RUNNING"), None)

    killed = directory_pid()
    assert killed
    with load(cluster) as texts:
        wait_until(lambda: len(texts) >= 2, "answers")
        os.kill(killed, signal.SIGKILL)
        seen = len(texts)
        wait_until(lambda: directory_pid() not in (None, killed), "another directory")
        wait_until(lambda: len(texts) >= seen + 4, "answers after the restart")
    assert len(set(texts)) == 1, "greedy answers to one prompt"
    after = wait_until(
        lambda: (told := status(cluster)) and all(group["agree"] for group in told["groups"]) and told, "agreement"
    )
    pids = [[one["pid"] for group in told["groups"] for one in group["replicas"]] for told in (before, after)]
    assert pids[0] == pids[1], "no expert replica was restarted"


def test_a_group_grows_and_shrinks_while_the_others_and_the_requests_go_on(cluster: Cluster, tmp_path: Path) -> None:
    """The same artifact under another spelling of its path, and other bounds for one group: nothing else is touched."""

    def pids() -> dict[str, set[int]]:
        return {group["name"]: {one["pid"] for one in group["replicas"]} for group in status(cluster)["groups"]}

    described = yaml.safe_load(cluster.config.read_text())
    artifact = Path(described["model"]["artifact"])
    described["model"]["artifact"] = str(artifact.parent / ".." / artifact.parent.name / artifact.name)
    grown = next(group for group in described["groups"] if group["name"] == "c")
    grown |= {"min_replicas": 2, "max_replicas": 2}
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(described))

    def rows_of(pid: int) -> int:
        replicas = next(group for group in status(cluster)["groups"] if group["name"] == "c")["replicas"]
        return next(one["rows_total"] for one in replicas if one["pid"] == pid)

    before = pids()
    with load(cluster) as texts:
        wait_until(lambda: len(texts) >= 2, "answers")
        try:
            assert cluster.run("up", str(changed), timeout_s=300).returncode == 0
            during = pids()
            assert len(during["c"]) == 2 and before["c"] < during["c"]
            (newcomer,) = during["c"] - before["c"]
            wait_until(lambda: rows_of(newcomer), "rows on the new replica")
        finally:
            assert cluster.run("up", str(cluster.config), timeout_s=300).returncode == 0
            wait_until(lambda: len(pids()["c"]) == 1, "one replica again")
        seen = len(texts)
        wait_until(lambda: len(texts) >= seen + 4, "answers from one replica")
    assert {name: now for name, now in pids().items() if name != "c"} == {
        name: then for name, then in before.items() if name != "c"
    }


def test_a_killed_replica_comes_back_and_no_request_fails(cluster: Cluster) -> None:
    (replica,) = next(group for group in status(cluster)["groups"] if group["name"] == "b")["replicas"]
    with load(cluster) as texts:
        wait_until(lambda: len(texts) >= 2, "answers")
        os.kill(replica["pid"], signal.SIGKILL)
        seen = len(texts)
        wait_until(lambda: len(texts) >= seen + 4, "answers from the new replica")
    assert len(set(texts)) == 1
