"""Groups of the running demo scale by themselves: to two and back, to none and back, and no request fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from session_cluster import Cluster
from test_status import load, status, wait_until

pytestmark = pytest.mark.cluster

SMALL = {"target_busy": 0.001, "up_after_s": 1, "down_after_s": 2}
"""Of what the demo's replicas do under load, a fraction."""


def groups(cluster: Cluster) -> dict[str, Any]:
    return {group["name"]: group for group in status(cluster)["groups"]}


def pids(found: dict[str, Any], name: str) -> set[int]:
    return {replica["pid"] for replica in found[name]["replicas"]}


def test_a_group_follows_its_load_and_another_sleeps_until_its_first_row(cluster: Cluster, tmp_path: Path) -> None:
    described = yaml.safe_load(cluster.config.read_text())
    by_name = {group["name"]: group for group in described["groups"]}
    by_name["c"] |= {"max_replicas": 2, "scaling": SMALL}
    by_name["d"] |= {"min_replicas": 0, "scaling": {"idle_after_s": 4}}
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(described))

    before = groups(cluster)
    try:
        with load(cluster) as texts:
            wait_until(lambda: len(texts) >= 2, "answers")
            assert cluster.run("up", str(changed), timeout_s=300).returncode == 0
            wait_until(lambda: groups(cluster)["c"]["ready"] == 2, "a second replica under load")
            during = groups(cluster)
            assert pids(before, "c") < pids(during, "c"), "the first one runs on"
            assert all(pids(before, name) == pids(during, name) for name in "abd")
            assert during["c"]["scaling"]["stalled"] is False
            seen = len(texts)
            wait_until(lambda: len(texts) >= seen + 4, "answers from two replicas")
        (text,) = set(texts)
        wait_until(
            lambda: (now := groups(cluster)) and now["c"]["ready"] == 1 and now["d"]["ready"] == 0, "less of both"
        )
        asleep = wait_until(lambda: (now := groups(cluster)["d"]) and now["agree"] and now, "agreement")
        assert (asleep["serve"]["running"], asleep["serve"]["target"]) == (0, 0)

        again = cluster.run("up", str(changed), timeout_s=300)
        assert again.returncode == 0, again.stderr
        assert "experts-d: RUNNING, asleep, ready" in again.stderr

        with load(cluster, streams=1) as texts:
            wait_until(lambda: len(texts) >= 2, "answers from a group that slept")
        assert set(texts) == {text}
        assert groups(cluster)["d"]["ready"] == 1
    finally:
        assert cluster.run("up", str(cluster.config), timeout_s=300).returncode == 0
        wait_until(lambda: all(group["ready"] == 1 for group in groups(cluster).values()), "one replica each")
