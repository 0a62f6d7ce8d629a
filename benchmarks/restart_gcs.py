"""What survives the head of a cluster where Ray keeps its state outside of it: as `restarts`, with the same load and
figures, on a Ray of two nodes.

The head has no CPUs and runs, as with the chart, the GCS, Ray's dashboard and Ray Serve's controller; routers and
replicas are on the worker, whose proxy the clients use, the directory there or, in a phase of its own, on the head.
SIGKILL to the GCS takes the rest of the head with it. After AWAY_S the head is started again, as Kubernetes would a
pod, with what its storage holds: a Redis, or a RocksDB in a directory, which Ray 2.60 calls alpha. `back_s` is from the
kill until all of Ray Serve runs again, `kept` the worker's replicas, engines and proxies that lived through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos import LEAD_S, READY_S, SETTLE_S, WORK, Chaos, Inflict, Phase, configure, say
from benchmarks.streamed import make_artifact, wake_at_once
from benchmarks.two_nodes import HEAD_RESOURCE, WORKER, TwoNodes, two_nodes, with_directory_at
from expertmesh.cluster import launch, local_ray
from expertmesh.commands.up import progress
from expertmesh.deployment import serve_config
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError
from expertmesh.resources import logical_cpus

TIMES, AWAY_S = 2, 20.0


@contextmanager
def redis() -> Iterator[dict[str, str]]:
    """Of our own, in memory alone; raises ClusterError where there is no redis-server."""
    program = shutil.which("redis-server")
    if program is None:
        raise ClusterError("there is no redis-server on the PATH")
    port = str(local_ray.free_ports(1)[0])
    command = [program, "--bind", local_ray.HOST, "--port", port, "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            yield {"RAY_REDIS_ADDRESS": f"{local_ray.HOST}:{port}"}
        finally:
            process.terminate()


@contextmanager
def rocksdb() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="em-") as folder:
        yield {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": folder}


STORAGES: dict[str, Callable[[], AbstractContextManager[dict[str, str]]]] = {"redis": redis, "rocksdb": rocksdb}
"""The head's environment."""
PLACES = {"worker": {WORKER: 0.001}, "head": {HEAD_RESOURCE: 0.001}}
"""Resources by which the directory is placed there."""


def run(cluster: str | None) -> dict[str, object]:
    """`cluster` is not used: it starts its own."""
    path = WORK / "cluster.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(configure(make_artifact(WORK)).model_dump(mode="json")))
    found: dict[str, object] = {}
    for name, made in STORAGES.items():
        with contextlib.ExitStack() as stack:
            try:
                storage = stack.enter_context(made())
            except ClusterError as error:
                say(f"{name} is skipped: {error}")
                found[name] = {"skipped": str(error)}
                continue
            found[name] = measure(launch.read_plan(path), storage)
    return found | {"device": "emulated"}


def measure(plan: launch.Plan, storage: dict[str, str]) -> dict[str, Any]:
    server = plan.config.server
    with two_nodes(storage, logical_cpus(plan.config), (server.http_port, server.grpc_port), WORK) as nodes:
        made = RestartGcs(nodes.record(plan), plan.config, plan=plan, nodes=nodes)
        with progress() as show:
            made.deploy(PLACES["worker"], show)
        at_once = wake_at_once()
        found = asyncio.run(made.run())
        return found | {"kept": made.kept, "away_s": AWAY_S, "client_wakes_at_once": at_once}


@dataclass
class RestartGcs(Chaos):
    plan: launch.Plan = field(kw_only=True)
    nodes: TwoNodes = field(kw_only=True)
    kept: dict[str, list[str]] = field(init=False, default_factory=dict)
    """Phase -> of each restart how many of how many of the worker's serving processes."""
    head_ports: Sequence[int] = field(init=False, default_factory=lambda: local_ray.free_ports(2))
    overloads = False

    def phases(self) -> dict[str, tuple[Inflict, str]]:
        after = {"worker": "head", "head": "worker"}
        return {f"directory_on_{place}": (self.restart(place, after[place]), "") for place in PLACES}

    def deploy(self, directory: dict[str, float], show: launch.Show) -> None:
        """As `up`, but for the ports of the head's proxies and the resources by which the directory finds its node."""
        wanted = serve_config(with_directory_at(self.config, directory), self.plan.manifest)
        for options, port in zip(("http_options", "grpc_options"), self.head_ports, strict=True):
            wanted[options]["port"] = port
        self.nodes.api.deploy(wanted)
        launch.wait_until_ready(self.plan, self.target, READY_S, show)

    def restart(self, place: str, after: str) -> Inflict:
        """With the directory at `place`, which is moved to `after` at the end."""

        async def inflict_all(phase: Phase) -> None:
            await asyncio.sleep(LEAD_S)
            for _ in range(TIMES):
                kept = await self.restart_head(phase)
                self.kept.setdefault(f"directory_on_{place}", []).append(kept)
            await self.last_a_minute(phase)
            await asyncio.to_thread(self.deploy, PLACES[after], lambda reached: None)

        return inflict_all

    async def restart_head(self, phase: Phase) -> str:
        """Returns when everything is as before: how many of how many of the worker's serving processes live on."""
        count = len((await asyncio.to_thread(list_table, self.target.directory)).replicas)
        ended = {one.pid for one in self.nodes.running(worker=False)}
        before = self.nodes.serving()
        began = time.perf_counter()
        await asyncio.to_thread(self.nodes.kill_gcs)
        await asyncio.sleep(max(0.0, began + AWAY_S - time.perf_counter()))
        await asyncio.to_thread(self.nodes.start_head)
        await self.until_whole(ended)
        await self.until_back(count, set(), "")
        await asyncio.sleep(SETTLE_S)
        begin, end = began, time.perf_counter()
        phase.faults.append((begin, end))
        kept = f"{len(before & self.nodes.serving())} of {len(before)}"
        longest = max([0.0, *phase.gaps_s([(begin, end)])])
        back = f"back after {end - begin - SETTLE_S:.1f} s, {kept} processes kept"
        say(f"head: {back}, longest gap {1e3 * longest:.0f} ms so far")
        return kept
