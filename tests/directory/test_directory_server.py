from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from expertmesh.directory.client import (
    Announcer,
    expert_load,
    list_table,
    report_decision,
    scaling,
    want,
    watch,
)
from expertmesh.directory.server import start_directory
from expertmesh.directory.table import merge
from expertmesh.errors import ClusterError
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import directory_pb2_grpc, expert_pb2

ROOT = Path(__file__).parents[2]


class Entry:
    """A replica's entry that the test changes."""

    def __init__(self, name: str) -> None:
        self.replica = pb.Replica(
            replica_id=name, group="g", address="127.0.0.1:1", fingerprint="f", state=expert_pb2.REPLICA_STATE_READY
        )

    def __call__(self) -> pb.Replica:
        return self.replica


@asynccontextmanager
async def directory(port: int = 0) -> AsyncIterator[str]:
    server, address = await start_directory("127.0.0.1", port)
    try:
        yield address
    finally:
        await server.stop(None)


@asynccontextmanager
async def announced(address: str, entry: Entry, lease_ms: int = 600) -> AsyncIterator[Announcer]:
    announcer = Announcer(address, lease_ms, entry)
    await announcer.start()
    try:
        yield announcer
    finally:
        await announcer.stop()


async def until(tables: AsyncIterator[pb.Table], condition: Callable[[pb.Table], bool]) -> pb.Table:
    async with asyncio.timeout(30):
        async for table in tables:
            if condition(table):
                return table
    raise AssertionError("the watch ended")


def names(table: pb.Table) -> set[str]:
    return {replica.replica_id for replica in table.replicas}


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def test_watchers_see_replicas_come_change_and_go() -> None:
    async def test() -> None:
        a, b = Entry("a"), Entry("b")
        async with directory() as address:
            tables = watch(address)
            assert (await until(tables, lambda table: True)).settling
            async with announced(address, a) as announcer:
                await until(tables, lambda table: names(table) == {"a"})
                async with announced(address, b):
                    version = (await until(tables, lambda table: names(table) == {"a", "b"})).version
                    a.replica.state = expert_pb2.REPLICA_STATE_DRAINING
                    announcer.changed()
                    draining = await until(tables, lambda table: table.version > version)
                    assert draining.replicas[0].state == expert_pb2.REPLICA_STATE_DRAINING
                await until(tables, lambda table: names(table) == {"a"})
            last = await until(tables, lambda table: not table.replicas)
            assert last.version > draining.version
            await tables.aclose()

    run(test)


def test_a_change_of_load_alone_reaches_watchers_under_the_same_version() -> None:
    async def test() -> None:
        entry = Entry("a")
        async with directory() as address, announced(address, entry):
            tables = watch(address)
            version = (await until(tables, lambda table: names(table) == {"a"})).version
            entry.replica.load.queued_rows = 7
            loaded = await until(tables, lambda table: table.replicas[0].load.queued_rows == 7)
            assert loaded.version == version
            await tables.aclose()

    run(test)


def test_a_silent_replica_is_dropped_after_its_lease() -> None:
    async def test() -> None:
        async with directory() as address, grpc.aio.insecure_channel(address) as channel:
            stub = directory_pb2_grpc.DirectoryServiceStub(channel)
            await stub.Announce(pb.AnnounceRequest(replica=Entry("a")(), lease_ms=500))
            tables = watch(address)
            await until(tables, lambda table: names(table) == {"a"})
            await until(tables, lambda table: not table.replicas)
            await tables.aclose()

    run(test)


def test_an_entry_of_no_use_is_refused_by_name() -> None:
    async def test() -> None:
        async with directory() as address, grpc.aio.insecure_channel(address) as channel:
            stub = directory_pb2_grpc.DirectoryServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError, match="address is empty") as refused:
                await stub.Announce(pb.AnnounceRequest(replica=pb.Replica(replica_id="a", group="g"), lease_ms=500))
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    run(test)


def test_many_watchers_are_served_and_forgotten() -> None:
    async def test() -> None:
        async with directory() as address, announced(address, Entry("a")):
            watchers = [watch(address) for _ in range(50)]
            await asyncio.gather(*(until(tables, lambda table: names(table) == {"a"}) for tables in watchers))
            for tables in watchers:
                await tables.aclose()
            assert names(await asyncio.to_thread(list_table, address)) == {"a"}

    run(test)


def test_a_directory_that_is_not_there_is_named_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"directory at {address} does not answer: ") as error:
            list_table(address, timeout_s=2)
    assert "\n" not in str(error.value)


def test_a_port_in_use_is_named() -> None:
    async def test() -> None:
        async with directory() as address:
            with pytest.raises(ClusterError, match=f"port {address.split(':')[1]} is in use"):
                await start_directory("127.0.0.1", int(address.split(":")[1]))

    run(test)


def counted(rows: int) -> list[pb.LayerRows]:
    return [pb.LayerRows(layer=1, experts=[0, 1], rows=[rows, 0])]


def test_announced_rows_are_asked_back() -> None:
    """Told when the replica announces itself first and after a change; its rhythm otherwise is seconds."""

    async def test() -> None:
        entry, rows = Entry("a"), [0]
        entry.replica.layers.add(layer=1, experts=[0, 1])
        async with directory() as address:
            announcer = Announcer(address, 600, entry, lambda: counted(rows[0]))
            await announcer.start()
            while not (reply := await asyncio.to_thread(expert_load, address, 0)).layers:
                await asyncio.sleep(0.05)
            assert reply.layers[0] == counted(0)[0]
            rows[0] = entry.replica.load.rows_total = 5
            announcer.changed()
            while (reply := await asyncio.to_thread(expert_load, address, 60)).layers[0].rows != [5, 0]:
                await asyncio.sleep(0.05)
            assert reply.fingerprint == "f" and 0 <= reply.oldest_report_s < 60
            with pytest.raises(ClusterError, match="window_s 601 is not within 0 to 600"):
                await asyncio.to_thread(expert_load, address, 601)
            await announcer.stop()

    run(test)


def test_a_directory_that_restarts_is_told_of_rows_at_once() -> None:
    async def test() -> None:
        entry = Entry("a")
        entry.replica.layers.add(layer=1, experts=[0, 1])
        entry.replica.load.rows_total = 5
        with directory_process(0) as (first, port):
            address = f"127.0.0.1:{port}"
            announcer = Announcer(address, 600, entry, lambda: counted(5))
            await announcer.start()
            while not (await asyncio.to_thread(expert_load, address, 0)).layers:
                await asyncio.sleep(0.05)
            first.kill()
            first.wait()
            with directory_process(port):
                while not (reply := await asyncio.to_thread(expert_load, address, 0, 20)).layers:
                    await asyncio.sleep(0.05)
                assert reply.layers[0] == counted(5)[0]
                await announcer.stop()

    run(test)


def test_decisions_are_reported_and_asked_back() -> None:
    async def test() -> None:
        async with directory() as address:
            made = pb.ScalingDecision(group="g", target_before=1, target=2, reason="busy 90% of 60%", max_replicas=4)
            await asyncio.to_thread(report_decision, address, made)
            (group,) = (await asyncio.to_thread(scaling, address)).groups
            assert group.last == made and list(group.changes) == [made] and not group.stalled
            with pytest.raises(ClusterError, match="group is empty"):
                await asyncio.to_thread(report_decision, address, pb.ScalingDecision())

    run(test)


def test_only_groups_that_sleep_are_wanted() -> None:
    async def test() -> None:
        async with directory() as address:
            a, b = Entry("a"), Entry("b")
            a.replica.group, b.replica.group = "ga", "gb"
            a.replica.layers.add(layer=1, experts=[0, 1])
            b.replica.layers.add(layer=1, experts=[1, 2])
            async with announced(address, a):
                async with announced(address, b):
                    while len((await asyncio.to_thread(list_table, address)).replicas) < 2:
                        await asyncio.sleep(0.02)
                    assert await want(address, 1, [0, 1, 2]) == []
                assert await want(address, 1, [1, 2]) == ["gb"]
                assert await want(address, 1, [0]) == await want(address, 2, [1]) == await want(address, 1, [7]) == []
                a.replica.state = expert_pb2.REPLICA_STATE_DRAINING
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(30):
                        while await want(address, 1, [0]) != ["ga"]:
                            await asyncio.sleep(0.05)
                assert await want(address, 1, [0]) == ["ga"], "one that drains takes no rows"

    run(test)


@contextlib.contextmanager
def directory_process(port: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "expertmesh.directory", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline().rsplit(":", 1)[1])
        finally:
            process.kill()


def test_replicas_and_watchers_outlive_a_killed_directory() -> None:
    async def test() -> None:
        with directory_process(0) as (first, port):
            address = f"127.0.0.1:{port}"
            async with announced(address, Entry("a")) as a, announced(address, Entry("b")) as b:
                tables = watch(address)
                before = await until(tables, lambda table: names(table) == {"a", "b"} and not table.settling)
                first.kill()
                first.wait()
                with directory_process(port):
                    table = merge(before, await until(tables, lambda table: True))
                    assert table.directory_id != before.directory_id and table.settling
                    assert names(table) == {"a", "b"}
                    while table.settling:
                        table = merge(table, await until(tables, lambda table: True))
                        assert names(table) == {"a", "b"}
                    assert a.alive and b.alive
                    await tables.aclose()

    run(test)
