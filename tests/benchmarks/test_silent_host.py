"""A host of its own that falls silent and comes back, with sockets and with rows: on this `partition_host` rests."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mesh import TRANSPORTS, group_args, running_directory, running_dispatcher

from benchmarks.host import Host, made_host
from expert_service.local import serve_replica
from expertmesh.artifact.manifest import read_manifest
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError
from expertmesh.v1 import directory_pb2

PATIENCE_S, SILENT_S = 60.0, 0.5
ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    caller, _ = server.accept()
    while data := caller.recv(16):
        caller.sendall(data)
"""
COUNT = """
import socket, sys
with socket.socket(type=socket.SOCK_DGRAM) as here:
    here.bind((sys.argv[1], 0))
    print(here.getsockname()[1], flush=True)
    _, caller = here.recvfrom(16)
    here.settimeout(0.02)
    count = 1
    while True:
        here.sendto(b"%d" % count, caller)
        try:
            here.recv(16)
            count += 1
        except TimeoutError:
            pass
"""
"""Tells its caller again and again how many datagrams have come."""


@pytest.fixture
def host() -> Iterator[Host]:
    """Namespaces are root's to make, and not in every container."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(made_host())
        except ClusterError as error:
            pytest.skip(str(error))
        yield made


@contextlib.contextmanager
def on(host: Host, *arguments: str) -> Iterator[str]:
    """A Python process there; yields its first line."""
    command = host.command([sys.executable, *arguments])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s"
        time.sleep(0.01)


def test_silence_tells_nobody_and_ends(host: Host) -> None:
    with contextlib.ExitStack() as stack:
        port = int(stack.enter_context(on(host, "-c", ECHO, host.address)))
        caller = stack.enter_context(socket.create_connection((host.address, port), PATIENCE_S))
        caller.sendall(b"before")
        assert caller.recv(16) == b"before"
        caller.settimeout(SILENT_S)
        with host.silent():
            caller.sendall(b"within")
            with pytest.raises(TimeoutError):
                caller.recv(16)
            with pytest.raises(TimeoutError):
                socket.create_connection((host.address, port), SILENT_S)
        caller.settimeout(PATIENCE_S)
        assert caller.recv(16) == b"within"


def test_nothing_gets_through_either_way(host: Host) -> None:
    with contextlib.ExitStack() as stack:
        there = host.address, int(stack.enter_context(on(host, "-c", COUNT, host.address)))
        here = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        here.settimeout(PATIENCE_S)
        here.sendto(b"before", there)
        assert here.recv(16) == b"1"
        with host.silent():
            here.sendto(b"within", there)
            here.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while here.recv(16):
                    pass  # told before
            here.settimeout(SILENT_S)
            with pytest.raises(TimeoutError):
                here.recv(16)
        here.settimeout(PATIENCE_S)
        assert here.recv(16) == b"1"
        here.sendto(b"after", there)
        until(lambda: here.recv(16) == b"2")


@pytest.mark.usefixtures("host")
def test_what_is_not_allowed_is_told() -> None:
    script = "from benchmarks.host import made_host\nwith made_host(): pass"
    without = ["setpriv", "--bounding-set=-net_admin,-sys_admin", "--inh-caps=-net_admin,-sys_admin"]
    tried = subprocess.run([*without, sys.executable, "-c", script], capture_output=True, text=True, check=False)
    said = tried.stderr.splitlines()[-1]
    assert said.startswith(
        "expertmesh.errors.ClusterError: a host of its own needs CAP_NET_ADMIN and CAP_SYS_ADMIN: ip "
    )


def test_an_interrupt_leaves_no_host(host: Host) -> None:
    """Of another process, whose interrupt comes while its host is silent."""
    script = (
        "from benchmarks.host import made_host\nimport time\n"
        "with made_host() as host, host.silent():\n    print(host.name, flush=True)\n    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert name in namespaces() and Path("/sys/class/net", name).exists()
        process.send_signal(signal.SIGINT)
    assert name not in namespaces() and not Path("/sys/class/net", name).exists()


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines()]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_go_on_while_one_of_two_hosts_is_silent(host: Host, demo_artifact: Path, transport: str) -> None:
    """And the host's replica, the same process, gets rows again afterwards."""
    experts = min(read_manifest(demo_artifact).layers.values())
    rows = torch.randn(6, read_manifest(demo_artifact).hidden_size, generator=torch.Generator().manual_seed(1))
    with running_directory(host=host.here) as directory, contextlib.ExitStack() as stack:
        near = group_args(demo_artifact, directory, "g", set(range(experts)), host=host.here)
        stack.enter_context(serve_replica(near, directory))
        router = stack.enter_context(running_dispatcher(demo_artifact, directory, transport))

        def step() -> torch.Tensor:
            """All rows to one expert: one message, to the replicas in turn."""
            return router.finish(router.start(0, rows, torch.full((6, 1), 4), torch.ones(6, 1)))

        def listed() -> list[directory_pb2.Replica]:
            return [one for one in list_table(directory).replicas if one.address.startswith(f"{host.address}:")]

        def steps_until(condition: Callable[[], bool]) -> None:
            def reached() -> bool:
                assert torch.equal(step(), expected)
                return condition()

            until(reached)

        def computes() -> bool:
            return any(one.load.rows_per_s > 0 for one in listed())

        expected = step()
        arguments = ["--artifact", str(demo_artifact), "--group", "g", "--experts", f"0-{experts - 1}"]
        arguments += ["--host", host.address, "--directory", directory]
        stack.enter_context(on(host, "-m", "expert_service", *arguments))
        steps_until(computes)
        (before,) = listed()
        late = router.counters.hedges_won + router.counters.resent_rows
        with host.silent():
            steps_until(lambda: not listed())
            assert router.counters.hedges_won + router.counters.resent_rows > late
            assert before.replica_id not in router.replicas.snapshot()
        steps_until(computes)
        (after,) = listed()
        assert (after.replica_id, after.pid) == (before.replica_id, before.pid)
