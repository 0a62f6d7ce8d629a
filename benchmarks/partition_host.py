"""What a whole host that falls silent costs the clients: as `chaos`, with the same load and figures, on a Ray of two
nodes.

The worker is on a host of its own, a network namespace, with one of the two replicas of each group; all else is on the
head: the others, routers, directory, Ray Serve's controller and the proxy that the clients use. Neither side is told
that the other one is silent.

- `cut_off`: the host is silent for FOR_S (`--for`), TIMES (`--times`) times; SETTLE_S after the directory lists its
  replicas again, the next time begins.
- `declared_dead`: it is silent until Ray has declared the node dead, and AFTER_S more. Nowhere else is room for its
  replicas, so Ray Serve waits for it. What ran there ends itself when it learns what it was declared, and Ray is
  started there again, as Kubernetes would.

`kept` is of each silence how many of how many of the host's serving processes outlived it; `moments_s` is, since the
silence began, when the directory left the host's replicas out, Ray declared the node dead, the silence ended, the
directory listed the same replicas again, the last of the host's processes ended, Ray ran there again, all replicas did,
and the longest gap ended.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.chaos import (
    FOR_S,
    GROUPS,
    LEAD_S,
    READY_S,
    RETURN_S,
    SETTLE_S,
    WORK,
    Chaos,
    Inflict,
    Phase,
    configure,
    say,
)
from benchmarks.host import Host, made_host
from benchmarks.streamed import make_artifact, wake_at_once
from benchmarks.two_nodes import HEAD_RESOURCE, TwoNodes, two_nodes, with_directory_at
from expertmesh.cluster import launch
from expertmesh.commands.up import progress
from expertmesh.config import ClusterConfig
from expertmesh.deployment import serve_config
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError
from expertmesh.resources import logical_cpus
from expertmesh.v1 import directory_pb2

TIMES, AFTER_S = 5, 10.0
ON_HEAD = {HEAD_RESOURCE: 0.001}
PLACES = {group: f"place-{group}" for group in GROUPS}
"""Custom Ray resources, of which each node has one and each replica takes one."""
POLL_S = 0.2


def run(cluster: str | None, for_s: float = FOR_S, times: int = TIMES) -> dict[str, object]:
    """`cluster` is not used: it starts its own."""
    path = WORK / "cluster.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(divided(configure(make_artifact(WORK))).model_dump(mode="json")))
    with ExitStack() as stack:
        try:
            host = stack.enter_context(made_host())
        except ClusterError as error:
            say(f"partition_host is skipped: {error}")
            return {"skipped": str(error)}
        return measure(launch.read_plan(path), host, for_s, times) | {"device": "emulated", "for_s": for_s}


def divided(config: ClusterConfig) -> ClusterConfig:
    """One replica of each group on each node, routers on the head."""
    groups = tuple(one.model_copy(update={"resources": {PLACES[one.name]: 1}}) for one in config.groups)
    engine = config.engine.model_copy(update={"resources": ON_HEAD})
    server = config.server.model_copy(update={"replica_host": "auto"})
    return config.model_copy(update={"groups": groups, "engine": engine, "server": server})


def measure(plan: launch.Plan, host: Host, for_s: float, times: int) -> dict[str, Any]:
    server, places = plan.config.server, dict.fromkeys(PLACES.values(), 1.0)
    ports = server.http_port, server.grpc_port
    cpus = logical_cpus(plan.config)
    with two_nodes({}, len(GROUPS), ports, WORK, head_cpus=cpus, resources=places, host=host) as nodes:
        made = PartitionHost(
            nodes.record(plan), plan.config, plan=plan, nodes=nodes, host=host, for_s=for_s, times=times
        )
        with progress() as show:
            made.deploy(show)
        at_once = wake_at_once()
        found = asyncio.run(made.run())
        return found | {"kept": made.kept, "moments_s": made.moments_s, "client_wakes_at_once": at_once}


@dataclass
class PartitionHost(Chaos):
    plan: launch.Plan = field(kw_only=True)
    nodes: TwoNodes = field(kw_only=True)
    host: Host = field(kw_only=True)
    for_s: float = field(kw_only=True)
    times: int = field(kw_only=True)
    kept: dict[str, list[str]] = field(init=False, default_factory=dict)
    moments_s: dict[str, float] = field(init=False, default_factory=dict)
    overloads = False

    def phases(self) -> dict[str, tuple[Inflict, str]]:
        return {"cut_off": (self.cut_off, ""), "declared_dead": (self.declared_dead, "")}

    def deploy(self, show: launch.Show) -> None:
        """As `up`, but for the directory's place."""
        self.nodes.api.deploy(serve_config(with_directory_at(self.config, ON_HEAD), self.plan.manifest))
        launch.wait_until_ready(self.plan, self.target, READY_S, show)

    async def cut_off(self, phase: Phase) -> None:
        await asyncio.sleep(LEAD_S)
        for _ in range(self.times):
            count, before = len(await asyncio.to_thread(self.listed)), self.nodes.serving()
            began = time.perf_counter()
            async with self.silence():
                await asyncio.sleep(self.for_s)
            await self.until_back(count, set(), "")
            await self.note(phase, "cut_off", began, before)
        await self.last_a_minute(phase)

    async def declared_dead(self, phase: Phase) -> None:
        await asyncio.sleep(LEAD_S)
        table, before = await asyncio.to_thread(self.listed), self.nodes.serving()
        there = {one.replica_id for one in table if one.address.startswith(f"{self.host.address}:")}
        began = time.perf_counter()

        def reached(moment: str) -> None:
            self.moments_s[moment] = round(time.perf_counter() - began, 1)

        def ended() -> bool:
            if "listed_again" not in self.moments_s and there & {one.replica_id for one in self.listed()}:
                reached("listed_again")
            return not self.nodes.running(worker=True)

        async with self.silence():
            await until(lambda: not there & {one.replica_id for one in self.listed()}, "has not left the host out")
            reached("left_out")
            await until(lambda: not self.nodes.has_worker(), "has not declared the node dead")
            reached("declared_dead")
            await asyncio.sleep(AFTER_S)
        reached("silence_ended")
        await until(ended, "has not ended on its host")
        reached("processes_ended")
        await asyncio.to_thread(self.nodes.start_worker)
        reached("ray_again")
        await self.until_whole({one.pid for one in before})
        await self.until_back(len(table), there, "")
        reached("all_replicas")
        longest_s = await self.note(phase, "declared_dead", began, before)
        self.moments_s["longest_gap"] = round(longest_s, 1)
        await self.last_a_minute(phase)

    @asynccontextmanager
    async def silence(self) -> AsyncIterator[None]:
        """Made and ended beside the clients, which `ip` would hold up."""
        with ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, self.host.silent())
            yield
            await asyncio.to_thread(stack.close)

    def listed(self) -> Sequence[directory_pb2.Replica]:
        return list_table(self.target.directory).replicas

    async def note(self, phase: Phase, name: str, began: float, before: set[psutil.Process]) -> float:
        """Returns how long after the silence began the longest gap so far ended, seconds."""
        kept = f"{len(before & self.nodes.serving())} of {len(before)}"
        await asyncio.sleep(SETTLE_S)
        ended = time.perf_counter()
        phase.faults.append((began, ended))
        self.kept.setdefault(name, []).append(kept)
        gaps = [(length, when - began) for one in phase.answers for when, length in one.gaps() if when >= began]
        length, when = max(gaps, default=(0.0, 0.0))
        back = f"back after {ended - began - SETTLE_S:.1f} s, {kept} processes kept"
        say(f"{name}: {back}, longest gap {1e3 * length:.0f} ms so far, until {when:.1f} s")
        return when


async def until(done: Callable[[], bool], what: str) -> None:
    """Raises ClusterError where it is not so within RETURN_S."""
    deadline = time.perf_counter() + RETURN_S
    while not await asyncio.to_thread(done):
        if time.perf_counter() > deadline:
            raise ClusterError(f"the cluster {what} after {RETURN_S:.0f} s")
        await asyncio.sleep(POLL_S)
