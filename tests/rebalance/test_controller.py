"""The controller on real replicas: loads that the directory observed, the planner, and what it applies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mesh import running_dispatcher
from test_rebalance_run import BEFORE, IMPATIENT, Mesh, state  # noqa: F401 - a fixture

from expertmesh.directory.client import expert_load
from expertmesh.rebalance.controlled import ControlledCluster
from expertmesh.rebalance.decision import Limits
from expertmesh.rebalance.watch import Controller, Report

HIDDEN = 64


@pytest.fixture
def skewed(state: Path, tiny_artifact: Path, directory: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mesh]:  # noqa: F811
    """Groups whose replicas have answered rows of which nearly all are for one expert of the first group and one of the
    second, and told the directory."""
    monkeypatch.setattr("expert_service.replica.QUIET_S", 0.1)
    made = Mesh(tiny_artifact, directory, {"a": "0-1", "b": "2-7"})
    with running_dispatcher(tiny_artifact, directory) as dispatcher:
        ids = torch.tensor([[0, 1]] * 90 + [[2, 3], [4, 5], [6, 7]])
        rows = torch.randn(len(ids), HIDDEN)
        for _ in range(20):
            for layer in (0, 1):
                dispatcher.finish(dispatcher.start(layer, rows, ids, torch.ones(ids.shape)))
    deadline = time.monotonic() + 20
    while sum(sum(one.rows) for one in expert_load(directory, 60).layers) < 20 * 2 * ids.numel():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield made
    made.cluster.close()


def controller(*, observe: bool) -> Controller:
    return Controller(Limits(threshold=0.05, cool_down_s=600), 60, observe)


def look(by: Controller, mesh: Mesh) -> Report:
    return by.look(lambda: ControlledCluster(mesh.record, lambda _: None, IMPATIENT, mesh.cluster))


def test_observes_then_applies_then_waits(skewed: Mesh) -> None:
    seen = look(controller(observe=True), skewed)
    assert seen.action == "would apply", seen.text
    assert seen.rows == 20 * 2 * 186 and seen.groups_changed
    assert skewed.deployed()[1] == {"a", "b"}
    acting = controller(observe=False)
    applied = look(acting, skewed)
    assert applied.action == "applied", applied.text
    source, groups = skewed.deployed()
    assert source == "expertmesh rebalance --watch" and set(skewed.running()) == groups != {"a", "b"}
    again = look(acting, skewed)
    assert again.action == "wait", again.text
    assert look(controller(observe=False), skewed).action == "wait", (
        "a new process knows of the cool-down or is content"
    )


def test_another_rebalance_is_under_way(skewed: Mesh) -> None:
    with skewed.local().journals.lock():
        report = look(controller(observe=False), skewed)
    assert (report.action, report.reason) == ("failed", "another rebalance of mesh is under way")
    assert skewed.deployed()[1] == {"a", "b"}


def test_a_directory_that_is_away(state: Path, tiny_artifact: Path, directory: str) -> None:  # noqa: F811
    made = Mesh(tiny_artifact, directory, BEFORE)
    try:
        made.record = made.record.model_copy(update={"directory": "127.0.0.1:1"})
        report = look(controller(observe=False), made)
        assert report.action == "failed" and "does not answer" in report.reason
    finally:
        made.cluster.close()
