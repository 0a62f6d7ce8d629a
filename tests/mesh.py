"""A directory and expert replicas in this process, over real gRPC on loopback, without Ray."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from marks import needs_native

from expert_service.replica import Replica
from expert_service.server import LoopThread
from expertmesh.args import GroupArgs
from expertmesh.artifact.manifest import read_manifest
from expertmesh.directory.server import start_directory
from expertmesh.experts import format_indices
from expertmesh.wire.tls import TlsFiles
from router_service.connection import RouterSettings, open_transport
from router_service.dispatcher import Dispatcher
from router_service.replicas import LiveReplicas

TRANSPORTS = ["python", pytest.param("native", marks=needs_native)]
"""For tests that run over either."""


def group_args(artifact: Path, directory: str, group: str, experts: set[int], **more: object) -> GroupArgs:
    """A group with the same experts in every MoE layer."""
    layers = dict.fromkeys(read_manifest(artifact).layers, format_indices(experts))
    return GroupArgs.model_validate(
        {"artifact": str(artifact), "group": group, "experts": layers, "directory": directory} | more
    )


def divide(experts: int, groups: int) -> list[set[int]]:
    """`groups` sets of neighbours."""
    return [set(range(experts * one // groups, experts * (one + 1) // groups)) for one in range(groups)]


@contextmanager
def running_groups(artifact: Path, directory: str, groups: int) -> Iterator[list[Replica]]:
    """One replica per group, the experts divided among them."""
    experts = max(read_manifest(artifact).layers.values())
    replicas = [
        Replica(group_args(artifact, directory, f"g{number}", members), directory)
        for number, members in enumerate(divide(experts, groups))
    ]
    try:
        yield replicas
    finally:
        for replica in replicas:
            replica.drain(1.0)
            replica.stop()


@contextmanager
def running_processes(artifact: Path, directory: str, groups: int) -> Iterator[None]:
    """The same in a process each: vLLM's kernels on a CPU have one scratch buffer per process, which attention uses
    too, so that replicas cannot compute beside an engine that overlaps."""
    experts = max(read_manifest(artifact).layers.values())
    given = ["-m", "expert_service", "--artifact", str(artifact), "--directory", directory]
    with contextlib.ExitStack() as stack:
        processes = []
        for number, members in enumerate(divide(experts, groups)):
            command = [sys.executable, *given, "--group", f"p{number}", "--experts", format_indices(members)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.terminate)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip(), "a replica ended before it served"
        yield


@contextmanager
def running_dispatcher(
    artifact: Path,
    directory: str,
    transport_name: str = "auto",
    tls: TlsFiles | None = None,
    checksums: bool = False,
) -> Iterator[Dispatcher]:
    """A router's dispatcher that follows the directory."""
    live = LiveReplicas()
    settings = RouterSettings.model_validate(
        {"directory": directory, "transport": transport_name, "tls": tls, "checksums": checksums}
    )
    transport = open_transport(settings, read_manifest(artifact).fingerprint, live)
    try:
        yield Dispatcher(live, transport, settings.wait_for_experts_s)
    finally:
        transport.close()


@contextmanager
def running_directory(tls: TlsFiles | None = None, host: str = "127.0.0.1") -> Iterator[str]:
    """Yields its host:port; with `tls` it asks for certificates."""
    thread = LoopThread("test-directory")
    server, address = thread.run(start_directory(host, 0, tls=tls))
    try:
        yield address
    finally:
        thread.run(server.stop(0))
        thread.stop()
