"""Processes that the wire's benchmarks talk to: replicas whose experts only echo, and the plain peers beside them.

`python -m benchmarks.echo ROLE …` prints the address at which it listens and ends with its standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

from expertmesh.errors import ClusterError

CORES = sorted(os.sched_getaffinity(0))
CALLER_CORES = set(CORES[:1])
"""Whether two processes that take turns share a core makes the same TCP exchange take 8 or 75 microseconds here. So it
is not left to chance: the caller has the first core, peers take turns from the second on, as if on other machines."""
HEAD = struct.Struct("<II")
"""Bytes that follow in the request, bytes wanted in the answer."""
UNARY_METHOD = "/benchmarks.Echo/Exchange"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@contextlib.contextmanager
def peers(role: str, arguments: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """One process per list of arguments, each on one core; yields their addresses once all listen."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.echo", role, *each],
                    cwd=Path(__file__).parents[1],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for each in arguments
        ]
        for number, process in enumerate(started, start=1):
            os.sched_setaffinity(process.pid, {CORES[number % len(CORES)]})
        try:
            yield [line_of(process) for process in started]
        finally:
            for process in started:
                process.terminate()


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that it prints; raises ClusterError where it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise ClusterError(f"a process of the benchmark ended with {process.wait(10)}")
    return line


def listen_tcp(polling_s: float) -> None:
    """Answers each request of one connection with as many bytes as it wants; polls for so long before it sleeps."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(f"127.0.0.1:{server.getsockname()[1]}", flush=True)
        connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(2**24))
    with connection:
        while receive(connection, buffer[: HEAD.size], polling_s):
            size, wanted = HEAD.unpack_from(buffer)
            receive(connection, buffer[:size], polling_s)
            connection.sendall(buffer[:wanted])


def receive(connection: socket.socket, into: memoryview, polling_s: float = 0) -> bool:
    """Fills `into`; False where the peer has closed. Polls for so long before it sleeps."""
    got = 0
    awake_until = time.perf_counter() + polling_s if polling_s else 0
    while got < len(into):
        polls = awake_until and time.perf_counter() < awake_until
        try:
            count = connection.recv_into(into[got:], 0, socket.MSG_DONTWAIT if polls else 0)
        except BlockingIOError:
            os.sched_yield()
            continue
        if not count:
            return False
        got += count
    return True


def serve_unary() -> None:
    """One gRPC call per request, bytes to bytes: as many back as the first four bytes say."""

    def exchange(request: bytes, context: Any) -> bytes:
        return bytes(int.from_bytes(request[:4], "little"))

    handlers: dict[str, Any] = {"Exchange": grpc.unary_unary_rpc_method_handler(exchange)}
    server = grpc.server(futures.ThreadPoolExecutor(4), options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmarks.Echo", handlers),))
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    server.start()
    sys.stdin.read()
    server.stop(None)


def serve_replica(given: argparse.Namespace) -> None:
    """A replica, all real but its executor."""
    import torch

    from benchmarks.wire import experts_of
    from expert_service.endpoint import NATIVE_MODULE
    from expert_service.executor import Executor, Pairs
    from expert_service.replica import Replica
    from expertmesh.args import GroupArgs

    class Echo(Executor):
        computation: Any
        """Where it is set, the native server echoes by itself."""

        def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
            if given.us_per_row:
                time.sleep(1e-6 * given.us_per_row * len(hidden_states))
            return hidden_states.float()

    torch.set_num_threads(1)
    args = GroupArgs(
        artifact=given.artifact,
        group=f"g{given.number}",
        experts=experts_of(given.number),
        transport=given.transport,
        max_queued_rows=given.max_queued_rows,
    )
    executor = Echo()
    if not given.python_executor and not given.us_per_row and importlib.util.find_spec(NATIVE_MODULE):
        executor.computation = importlib.import_module(NATIVE_MODULE).Echo()
    replica = Replica(args, given.directory, executor=executor)
    print(replica.address, flush=True)
    sys.stdin.read()
    replica.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.echo", description=__doc__)
    roles = parser.add_subparsers(dest="role", required=True)
    tcp = roles.add_parser("tcp")
    tcp.add_argument("--polling-s", type=float, default=0)
    roles.add_parser("unary")
    replica = roles.add_parser("replica")
    replica.add_argument("--artifact", required=True)
    replica.add_argument("--number", type=int, required=True)
    replica.add_argument("--directory", required=True)
    replica.add_argument("--transport", default="auto")
    replica.add_argument("--python-executor", action="store_true", help="also behind the native server")
    replica.add_argument("--us-per-row", type=float, default=0)
    replica.add_argument("--max-queued-rows", type=int, default=65536)
    given = parser.parse_args()
    if given.role == "tcp":
        listen_tcp(given.polling_s)
    elif given.role == "unary":
        serve_unary()
    else:
        serve_replica(given)


if __name__ == "__main__":
    main()
