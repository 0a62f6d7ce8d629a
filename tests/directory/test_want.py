"""Groups that sleep are woken by the first row for them: real directory, replicas and router."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mesh import TRANSPORTS, group_args, running_dispatcher
from tiny_models import EXPERTS, make_checkpoint

from expert_service.replica import Replica
from expert_service.server import LoopThread
from expertmesh.artifact.prepare import prepare
from expertmesh.directory.directory import Directory
from expertmesh.directory.server import start_directory
from expertmesh.errors import ClusterError
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import expert_pb2


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("want")
    prepare(make_checkpoint("mixtral", folder / "checkpoint"), folder / "artifact")
    return folder / "artifact"


class Sleepers:
    """Two groups, each with a replica once it is woken; what Ray Serve does for a cluster."""

    def __init__(self, artifact: Path) -> None:
        self.address = ""
        self.woken: list[str] = []
        self.running: dict[str, Replica] = {}
        half = EXPERTS // 2
        self._experts = {"low": set(range(half)), "high": set(range(half, EXPERTS))}
        self._artifact = artifact

    async def wake(self, group: str) -> None:
        self.woken.append(group)
        self.running[group] = await asyncio.to_thread(self.start, group)

    async def replicas(self) -> dict[str, int]:
        return {group: int(group in self.running) for group in self._experts}

    def start(self, group: str) -> Replica:
        return Replica(group_args(self._artifact, self.address, group, self._experts[group]), self.address)

    def stop(self, group: str) -> None:
        replica = self.running.pop(group)
        replica.drain(1.0)
        replica.stop()


@contextmanager
def sleeping(artifact: Path) -> Iterator[Sleepers]:
    groups = Sleepers(artifact)
    thread = LoopThread("test-directory")
    server, groups.address = thread.run(start_directory("127.0.0.1", 0, groups))
    try:
        yield groups
    finally:
        for group in list(groups.running):
            groups.stop(group)
        thread.run(server.stop(0))
        thread.stop()


def rows_for(expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ones(1, 64), torch.tensor([[expert]]), torch.ones(1, 1)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_group_that_went_to_sleep_is_woken_by_its_first_row(artifact: Path, transport: str) -> None:
    with sleeping(artifact) as groups, running_dispatcher(artifact, groups.address, transport) as dispatcher:
        for group in ("low", "high"):
            groups.running[group] = groups.start(group)
        before = dispatcher.finish(dispatcher.start(0, *rows_for(0)))
        groups.stop("low")
        dispatcher.finish(dispatcher.start(0, *rows_for(EXPERTS - 1)))
        assert groups.woken == [], "the other group alone is needed"
        after = dispatcher.finish(dispatcher.start(0, *rows_for(0)))
        assert groups.woken == ["low"]
        assert torch.equal(before, after)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_directory_that_knows_no_group_wakes_all_that_sleep(artifact: Path, transport: str) -> None:
    """As after its restart, or where a group never had a replica."""
    with sleeping(artifact) as groups, running_dispatcher(artifact, groups.address, transport) as dispatcher:
        output = dispatcher.finish(dispatcher.start(0, *rows_for(0)))
        assert output.abs().sum() > 0
        assert sorted(groups.woken) == ["high", "low"]


class Removed:
    """One group exists and sleeps."""

    def __init__(self) -> None:
        self.asked = 0
        self.answers = True

    async def wake(self, group: str) -> None:
        raise ClusterError(f"Application 'experts-{group}' does not exist.")

    async def replicas(self) -> dict[str, int]:
        self.asked += 1
        if not self.answers:
            raise ClusterError("no controller")
        return {"asleep": 0}


def entry(group: str) -> pb.Replica:
    return pb.Replica(
        replica_id=group,
        group=group,
        address="127.0.0.1:1",
        fingerprint="f",
        layers=[expert_pb2.LayerExperts(layer=1, experts=[3])],
        state=expert_pb2.REPLICA_STATE_READY,
    )


class Meanwhile:
    """Somebody decides for a group of which nothing was known when it was asked which groups exist."""

    def __init__(self) -> None:
        self.directory = Directory(self, stalled_after_s=0)

    async def wake(self, group: str) -> None:
        raise ClusterError(group)

    async def replicas(self) -> dict[str, int]:
        self.directory.report_decision(pb.ScalingDecision(group="unasked", target=1))
        await asyncio.sleep(0.01)
        return {"asked": 1}


def test_no_group_is_called_stalled_before_it_was_asked_whether_it_exists() -> None:
    async def test() -> None:
        directory = Meanwhile().directory
        directory.report_decision(pb.ScalingDecision(group="asked", target=1))
        await asyncio.sleep(0.01)
        assert (await directory.health())["stalled"] == ["asked"]

    asyncio.run(test())


def test_a_group_that_cannot_be_woken_is_forgotten_and_its_autoscaler_never_stalled() -> None:
    async def test() -> None:
        groups = Removed()
        directory = Directory(groups, stalled_after_s=-1)
        for group in ("removed", "asleep", "live"):
            directory.announce(pb.AnnounceRequest(replica=entry(group), lease_ms=60_000))
            directory.report_decision(pb.ScalingDecision(group=group, target=1))
        for group in ("removed", "asleep"):
            directory.withdraw(pb.WithdrawRequest(replica_id=group))
        wanted = pb.WantRequest(layer=1, experts=[3])
        assert list((await directory.want(wanted)).groups) == ["asleep", "removed"]
        await asyncio.sleep(0.01)
        assert list((await directory.want(wanted)).groups) == []
        assert groups.asked == 0, "every expert that is wanted has a group that is known"
        groups.answers = False
        assert (await directory.health())["stalled"] == ["asleep", "live", "removed"], "who exists is not known"
        groups.answers = True
        health = await directory.health()
        assert health["status"] == "stalled" and health["stalled"] == ["asleep", "live"]
        assert set(health["groups"]) == {"asleep", "live"}

    asyncio.run(test())


def test_who_sleeps_is_asked_once_a_second_at_most() -> None:
    async def test() -> None:
        groups = Removed()
        directory = Directory(groups)
        for _ in range(10):
            await directory.want(pb.WantRequest(layer=1, experts=[3]))
        assert groups.asked == 1
        await asyncio.sleep(0)

    asyncio.run(test())
