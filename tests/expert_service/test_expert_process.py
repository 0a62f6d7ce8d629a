"""A replica in a plain process, and its life in the directory."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from expert_service.__main__ import main
from expert_service.local import group_args, serve_replica
from expertmesh.directory.client import list_table
from expertmesh.directory.server import start_directory
from expertmesh.v1 import directory_pb2, expert_pb2_grpc
from expertmesh.v1 import expert_pb2 as pb

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0


@contextlib.contextmanager
def directory() -> Iterator[str]:
    """A directory on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server, address = asyncio.run_coroutine_threadsafe(start_directory("127.0.0.1", 0), loop).result(PATIENCE_S)
    try:
        yield address
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def until(address: str, condition: Callable[[list[directory_pb2.Replica]], bool]) -> list[directory_pb2.Replica]:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if condition(found := list(list_table(address).replicas)):
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {PATIENCE_S} s; last: {found}")


def test_a_replica_announces_drains_and_withdraws(artifact: Path) -> None:
    with directory() as address, serve_replica(group_args(artifact, "g", "0-3", lease_ms=900), address) as replica:
        (entry,) = until(address, bool)
        assert (entry.replica_id, entry.group, entry.address) == (replica.replica_id, "g", replica.address)
        assert entry.state == pb.REPLICA_STATE_READY and entry.fingerprint == "f" * 16
        assert entry.expert_bytes == 2 * 4 * 4 * 3 * 16 * 24
        replica.drain(10)
        assert not list_table(address).replicas


def test_a_replica_serves_while_the_directory_is_away(artifact: Path) -> None:
    with serve_replica(group_args(artifact, "g", "0-3", lease_ms=300), "127.0.0.1:1") as replica:
        with grpc.insecure_channel(replica.address) as channel:
            assert expert_pb2_grpc.ExpertServiceStub(channel).Describe(pb.DescribeRequest()).group == "g"
        assert replica.problem() is None


def test_a_process_of_its_own_prints_its_address_and_leaves_on_sigterm(artifact: Path) -> None:
    arguments = ["--artifact", str(artifact), "--group", "g", "--experts", "0-3"]
    with directory() as address:
        command = [sys.executable, "-m", "expert_service", *arguments, "--directory", address]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            printed = process.stdout.readline().strip()
            (entry,) = until(address, bool)
            assert entry.address == printed and entry.pid == process.pid
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        assert not list_table(address).replicas


@pytest.mark.parametrize(
    ("artifact_name", "experts", "wrong"),
    [("", "0-99", "group g: experts: layer 1 has experts 0-5, not 6-99"), ("nowhere", "0", "no artifact here")],
)
def test_a_process_that_cannot_serve_says_why_in_one_line(
    artifact: Path, artifact_name: str, experts: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--artifact", str(artifact / artifact_name), "--group", "g", "--experts", experts]
    monkeypatch.setattr(sys, "argv", ["expert_service", *arguments])
    with pytest.raises(SystemExit, match=wrong) as ended:
        main()
    assert "\n" not in str(ended.value)
