"""Mutual TLS with a directory of its own server: whom it lets in, and files that are replaced meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from certificates import Authority, install
from mesh import TRANSPORTS, group_args, running_directory
from tiny_models import EXPERTS, make_checkpoint

from expert_service.replica import Replica
from expertmesh.artifact.manifest import read_manifest
from expertmesh.artifact.prepare import prepare
from expertmesh.directory.client import Announcer, expert_load, list_table, report_decision, scaling, want, watch
from expertmesh.errors import ClusterError, ConfigError
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import expert_pb2
from expertmesh.wire.tls import TlsFiles
from router_service.connection import RouterSettings, open_transport
from router_service.dispatcher import Dispatcher
from router_service.replicas import LiveReplicas

PATIENCE_S = 30.0
LEASE_MS = 600


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def tls(ours: Authority) -> TlsFiles:
    return ours.issue()


@pytest.fixture
def directory(tls: TlsFiles) -> Iterator[str]:
    with running_directory(tls) as address:
        yield address


def entry() -> pb.Replica:
    return pb.Replica(
        replica_id="a", group="g", address="127.0.0.1:1", fingerprint="f", state=expert_pb2.REPLICA_STATE_READY
    )


def decision() -> pb.ScalingDecision:
    return pb.ScalingDecision(group="g", running=1, target_before=1, target=1, asked=1, min_replicas=1, max_replicas=1)


def test_every_call_works_with_a_certificate(directory: str, tls: TlsFiles) -> None:
    async def test() -> None:
        announcer = Announcer(directory, LEASE_MS, entry, tls=tls)
        await announcer.start()
        tables = watch(directory, tls)
        async with asyncio.timeout(PATIENCE_S):
            async for table in tables:
                if [one.replica_id for one in table.replicas] == ["a"]:
                    break
        await tables.aclose()
        assert await want(directory, 0, [0], tls=tls) == []
        await asyncio.to_thread(report_decision, directory, decision(), tls=tls)
        assert [one.last.group for one in scaling(directory, tls=tls).groups] == ["g"]
        assert not expert_load(directory, 0, tls=tls).layers
        await announcer.stop()
        assert not list_table(directory, tls=tls).replicas

    asyncio.run(test())


def test_without_a_certificate_of_the_authority_nobody_gets_in(directory: str, tmp_path: Path, tls: TlsFiles) -> None:
    other = Authority(tmp_path, "theirs").issue().model_copy(update={"ca": tls.ca})
    for shown in (None, other):
        with pytest.raises(ClusterError, match=f"directory at {directory} does not answer: UNAVAILABLE"):
            list_table(directory, timeout_s=1, tls=shown)


def test_a_directory_of_another_authority_is_not_believed(directory: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=f"directory at {directory} does not answer: UNAVAILABLE"):
        list_table(directory, timeout_s=1, tls=Authority(tmp_path, "theirs").issue())


def test_files_that_cannot_serve_are_named(directory: str, tls: TlsFiles, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"security\.tls\.key: .*absent: no such file"):
        list_table(directory, tls=tls.model_copy(update={"key": tmp_path / "absent"}))


def test_whoever_stays_follows_files_that_are_replaced(
    directory: str, tmp_path: Path, ours: Authority, tls: TlsFiles
) -> None:
    """An announcement and a reporter whose connections are open, after each change of the directory's and their own
    files."""
    mine, new = Authority(tmp_path, "mine").issue(), Authority(tmp_path, "new")
    install(tls, mine, "ca", "certificate", "key")
    old = tls.read()
    of_old = TlsFiles.in_folder(tmp_path / "old")
    of_old.ca.parent.mkdir()
    for path, content in ((of_old.ca, old.ca), (of_old.certificate, old.certificate), (of_old.key, old.key)):
        path.write_bytes(content)

    def replace(source: TlsFiles, *names: str, authorities: tuple[Authority, ...] = ()) -> None:
        for files in (tls, mine):
            install(source, files, *names, authorities=authorities)

    steps: list[Callable[[], None]] = [
        lambda: install(ours.issue(), mine, "certificate", "key"),
        lambda: replace(mine, authorities=(ours, new)),
        lambda: replace(new.issue(), "certificate", "key"),
        lambda: replace(mine, authorities=(new,)),
    ]

    async def test() -> None:
        announcer = Announcer(directory, LEASE_MS, entry, tls=mine)
        await announcer.start()
        for step in steps:
            step()
            await asyncio.sleep(2 * LEASE_MS / 1000)
            found = await asyncio.to_thread(list_table, directory, tls=mine)
            assert [one.replica_id for one in found.replicas] == ["a"]
            await asyncio.to_thread(report_decision, directory, decision(), tls=mine)
        with pytest.raises(ClusterError, match="does not answer: UNAVAILABLE"):
            await asyncio.to_thread(list_table, directory, 1.0, of_old)
        await announcer.stop()

    asyncio.run(test())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_router_follows_it_and_rows_cross(
    directory: str, tmp_path_factory: pytest.TempPathFactory, tls: TlsFiles, transport: str
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    prepare(make_checkpoint("mixtral", folder / "checkpoint"), folder / "artifact")
    args = group_args(folder / "artifact", directory, "g", set(range(EXPERTS)), tls=tls)
    replica = Replica(args, directory, directory_tls=tls)
    live = LiveReplicas()
    files = {"tls": tls, "directory_tls": tls}
    settings = RouterSettings.model_validate({"directory": directory, "transport": transport} | files)
    opened = open_transport(settings, read_manifest(folder / "artifact").fingerprint, live)
    try:
        made = Dispatcher(live, opened, PATIENCE_S)
        started = made.start(0, torch.ones(2, 64), torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5))
        assert made.finish(started).shape == (2, 64)
    finally:
        opened.close()
        replica.drain(1.0)
        replica.stop()
