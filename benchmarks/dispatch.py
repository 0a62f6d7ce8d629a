"""Round trip of one dispatch, packing and combining included, beside a raw TCP echo of the same bytes and others.

For each case ROWSxREPLICAS all ways take turns; a figure is the median over the rounds. The ways: `native`, `python`
(expertmesh's transports, each with replicas of its kind), `python_executor` (the native transport, but replicas whose
executor is called through Python, as on a GPU), `tcp`, `polling_tcp`, `unary` (one gRPC call per replica) and `handle`
(one Ray Serve handle per replica, measured beside the first three again while that Ray runs). The ends of `tcp` sleep
until the kernel wakes them; those of `polling_tcp` poll before they do, as the native transport's do.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch

from benchmarks import measure, wire
from benchmarks.echo import CALLER_CORES, HEAD, OPTIONS, UNARY_METHOD, peers, receive
from benchmarks.emulated_tier import own_ray
from expertmesh.cluster.local_ray import HOST
from router_service.dispatch.scatter import scatter, to_pairs
from router_service.dispatcher import Dispatcher

ROWS = (1, 16, 64, 256)
REPLICAS = (1, 2, 4)
ROUNDS = 7
CALLS = 300
HANDLE_CALLS = 30
POLLING_S = 1e-3
"""The longest that an end of the native transport polls before it sleeps."""
CASES = [(rows, count) for count in REPLICAS for rows in ROWS]
SHARES = {0.5: "p50", 0.99: "p99"}

OURS: dict[str, tuple[str, tuple[str, ...]]] = {name: (name, ()) for name in wire.TRANSPORTS}
"""Way -> transport, and what its replicas are told; the first is the one that a cluster would use."""
if "native" in OURS:
    OURS["python_executor"] = "native", ("--python-executor",)

Way = Callable[[], object]
Rounds = dict[str, list[list[float]]]


def run(cluster: str | None) -> dict[str, object]:
    """Needs no cluster. Figures per case; names without a prefix are of the fastest transport that is there."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, CALLER_CORES)
    figures: dict[str, dict[str, float]] = {}
    with _tier() as tier:
        wired = {case: _alternate(tier.ways(*case) | tier.peers(*case), CALLS) for case in CASES}
        with ray_handles(max(REPLICAS)) as handles:
            for case in CASES:
                ways = tier.ways(*case) | {"handle": handles.way(sizes(*case))}
                _note(figures, case, wired[case], _alternate(ways, HANDLE_CALLS))
    return dict(figures)


def _note(figures: dict[str, dict[str, float]], case: tuple[int, int], wired: Rounds, handled: Rounds) -> None:
    """Adds the figures of one case, without and with a Ray running."""
    key = f"{case[0]}x{case[1]}"
    for number, way in enumerate(OURS):
        prefix = f"{way}_" if number else ""
        for share, name in SHARES.items():
            for peer in ("tcp", "polling_tcp"):
                ratio = _ratio(wired, way, peer, share)
                figures.setdefault(f"{prefix}ratio_to_{peer}_{name}", {})[key] = round(ratio, 2)
        speedup = _ratio(handled, "handle", way, 0.5)
        figures.setdefault(f"{prefix}speedup_over_handle", {})[key] = round(speedup, 1)
    for name, rounds in {**wired, "handle": handled["handle"]}.items():
        for share, suffix in SHARES.items():
            microseconds = 1e6 * measure.median_percentile(rounds, share)
            figures.setdefault(f"{name}_us_{suffix}", {})[key] = round(microseconds)


def _ratio(rounds: Rounds, above: str, below: str, share: float) -> float:
    per_round = {name: [measure.percentile(one, share) for one in rounds[name]] for name in (above, below)}
    return measure.median_ratio(per_round[above], per_round[below])


def _alternate(ways: dict[str, Way], calls: int) -> Rounds:
    return measure.alternate({name: functools.partial(measure.timed, way, calls) for name, way in ways.items()}, ROUNDS)


@dataclass(frozen=True)
class Tier:
    """Everything that listens, but Ray."""

    dispatchers: dict[str, Dispatcher]
    tcp: TcpPeers
    polling_tcp: TcpPeers
    unary: UnaryPeers

    def ways(self, rows: int, count: int) -> dict[str, Way]:
        """expertmesh's."""
        routed = wire.routed(rows)
        return {name: functools.partial(wire.step, made, count, routed) for name, made in self.dispatchers.items()}

    def peers(self, rows: int, count: int) -> dict[str, Way]:
        each = sizes(rows, count)
        tcp = {"tcp": self.tcp.way(each), "polling_tcp": self.polling_tcp.way(each)}
        return {**tcp, "unary": self.unary.way(each)}


def sizes(rows: int, count: int) -> list[tuple[int, int]]:
    """Bytes of payload to and from each replica that a dispatch of `rows` rows touches."""
    _, ids, weights = wire.routed(rows)
    pairs = to_pairs(ids, weights)
    owners = {expert: str(expert * count // wire.EXPERTS) for expert in range(wire.EXPERTS)}
    row_bytes = 2 * wire.HIDDEN
    return [
        (len(batch.rows) * row_bytes + 12 * len(batch.pair_rows), len(batch.rows) * row_bytes)
        for batch in scatter(pairs, owners)
    ]


@contextlib.contextmanager
def _tier() -> Iterator[Tier]:
    count = max(REPLICAS)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        manifest = wire.make_artifact(folder)
        dispatchers = {}
        for way, (transport, options) in OURS.items():
            directory = stack.enter_context(wire.directory())
            stack.enter_context(wire.replicas(folder, directory, count, transport, *options))
            made = wire.dispatcher(directory, manifest.fingerprint, count, transport)
            dispatchers[way] = stack.enter_context(made)
        tcp = TcpPeers(stack.enter_context(peers("tcp", [[]] * count)))
        stack.callback(tcp.close)
        polling = stack.enter_context(peers("tcp", [[f"--polling-s={POLLING_S}"]] * count))
        polling_tcp = TcpPeers(polling, POLLING_S)
        stack.callback(polling_tcp.close)
        unary = UnaryPeers(stack.enter_context(peers("unary", [[]] * count)))
        yield Tier(dispatchers, tcp, polling_tcp, unary)


class TcpPeers:
    """Blocking sends to all, then receives from all, which poll for so long before they sleep."""

    def __init__(self, addresses: Sequence[str], polling_s: float = 0) -> None:
        self._polling_s = polling_s
        self._connections = [_connect(address) for address in addresses]

    def way(self, sizes: Sequence[tuple[int, int]]) -> Way:
        requests = [HEAD.pack(sent, wanted) + bytes(sent) for sent, wanted in sizes]
        answers = [memoryview(bytearray(wanted)) for _, wanted in sizes]
        used = self._connections[: len(sizes)]

        def exchange() -> None:
            for connection, request in zip(used, requests, strict=True):
                connection.sendall(request)
            for connection, answer in zip(used, answers, strict=True):
                receive(connection, answer, self._polling_s)

        return exchange

    def close(self) -> None:
        for connection in self._connections:
            connection.close()


def _connect(address: str) -> socket.socket:
    host, _, port = address.partition(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class UnaryPeers:
    """One call to each, all under way at once."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._calls: list[Any] = [
            grpc.insecure_channel(address, OPTIONS).unary_unary(UNARY_METHOD) for address in addresses
        ]

    def way(self, sizes: Sequence[tuple[int, int]]) -> Way:
        requests = [wanted.to_bytes(4, "little") + bytes(sent) for sent, wanted in sizes]
        used = self._calls[: len(sizes)]

        def exchange() -> None:
            if len(used) == 1:
                used[0](requests[0])
                return
            under_way = [call.future(request) for call, request in zip(used, requests, strict=True)]
            for answer in under_way:
                answer.result()

        return exchange


class HandlePeers:
    """One Ray Serve handle call to each, all under way at once."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def way(self, sizes: Sequence[tuple[int, int]]) -> Way:
        requests = [bytes(sent) for sent, _ in sizes]
        used = self._handles[: len(sizes)]

        def exchange() -> None:
            under_way = [
                handle.remote(request, wanted)
                for handle, request, (_, wanted) in zip(used, requests, sizes, strict=True)
            ]
            for answer in under_way:
                answer.result()

        return exchange


@contextlib.contextmanager
def ray_handles(count: int) -> Iterator[HandlePeers]:
    """`count` deployments that echo, in a Ray of their own."""
    # not by ray.init: its processes would be forked from this one, amid gRPC's threads, and at times one never came up
    with tempfile.TemporaryDirectory(prefix="expertmesh-") as folder, own_ray(count + 2, Path(folder)) as started:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": started.token}
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # the head is on 127.0.0.1
        import ray  # which reads them when it is imported
        from ray import serve

        class Echo:
            def __call__(self, request: bytes, wanted: int) -> bytes:
                return bytes(wanted)

        ray.init(address=started.gcs, _node_ip_address=HOST, log_to_driver=False, configure_logging=False)
        try:
            serve.start(proxy_location="Disabled")
            handles = [
                serve.run(serve.deployment(Echo).bind(), name=f"echo{number}", route_prefix=None)
                for number in range(count)
            ]
            peers = HandlePeers(handles)
            peers.way([(4, 4)] * count)()
            yield peers
        finally:
            serve.shutdown()
            ray.shutdown()
