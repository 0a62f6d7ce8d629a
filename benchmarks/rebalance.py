"""A plan applied to a running cluster under load, by `expertmesh rebalance`: there and back again.

The demo model in fp32 on a local Ray cluster, four groups become three others and then the first four again, while
`STREAMS` clients stream completions, greedily and without a pause, over fixed prompts. In bf16 the sums that replicas
send are rounded once each, so that another grouping may change a last bit and, rarely, a token; in fp32 with two
experts per token it cannot. `tokens_differing` counts the tokens from the first difference on, of each answer against
the first answer to its prompt in the run without a rebalance; `tokens_differing_without` are those within that run.
`stall_ms` is the longest gap between two pieces of one answer beyond the run's own 99th percentile, the worse of both
ways; `stall_ms_without` is the same of the run without. Ray Serve LLM sends what came within 50 ms as one piece, so
gaps are those a client sees.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from benchmarks.measure import percentile
from benchmarks.streamed import Answer, complete, differing, expectations, make_artifact, wake_at_once
from examples import demo
from expertmesh.artifact.manifest import read_manifest
from expertmesh.cluster import launch, local_ray, record
from expertmesh.cluster.record import Record
from expertmesh.commands.up import bring_up
from expertmesh.config import ClusterConfig, EngineSection, GroupSection, ModelSection, ServerSection
from expertmesh.errors import ClusterError
from expertmesh.placement.plan import Plan, plan_text

WORK = Path(__file__).parents[1] / ".bench" / "rebalance"
MODEL, NAME = "demo", "bench-rebalance"
BEFORE = {"a": "0-3", "b": "4-7", "c": "8-11", "d": "12-15"}
AFTER = {"hot": "0-1", "warm": "2-8", "cold": "9-15"}
STREAMS, PROMPTS, MAX_TOKENS = 4, 16, 64
WITHOUT_S, SETTLE_S = 40.0, 5.0
READY_S = 600.0


@dataclass
class Run:
    """What the clients saw."""

    answers: list[Answer] = field(default_factory=list)
    """Whole ones."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def gaps_s(self) -> list[float]:
        """Between two pieces of one answer."""
        return [length for answer in self.answers for _, length in answer.gaps()]

    @property
    def first_token_s(self) -> list[float]:
        return [answer.pieces[0][0] - answer.sent for answer in self.answers]

    @property
    def stall_ms(self) -> float:
        return 1e3 * (max(self.gaps_s) - percentile(self.gaps_s, 0.99))


def run(cluster: str | None) -> dict[str, object]:
    """`cluster` is not used: it starts its own."""
    artifact = make_artifact(WORK)
    started = bring_up(launch.read_plan(write_config(artifact)), None, READY_S)
    try:
        at_once = wake_at_once()
        prompts = demo.prompts()[:PROMPTS]
        asyncio.run(load(started, prompts, asyncio.sleep(10)))  # warm-up
        without = asyncio.run(load(started, prompts, asyncio.sleep(WITHOUT_S)))
        there = asyncio.run(load(started, prompts, change(write_plan(artifact))))
        back = asyncio.run(load(started, prompts, change(record.state_dir(NAME) / "plan-before.json")))
    finally:
        launch.stop(started)
    return figures(without, {"there": there, "back": back}) | {"client_wakes_at_once": at_once}


def figures(without: Run, changes: dict[str, Run]) -> dict[str, object]:
    expected = expectations(without.answers)
    runs = {"without": without, **changes}
    return {
        "failed_requests": sum(len(one.failures) for one in changes.values()),
        "stall_ms": round(max(one.stall_ms for one in changes.values()), 1),
        "tokens_differing": sum(differing(one.answers, expected) for one in changes.values()),
        "stall_ms_without": round(without.stall_ms, 1),
        "tokens_differing_without": differing(without.answers, expected),
        "gap_p99_ms": {name: round(1e3 * percentile(one.gaps_s, 0.99), 1) for name, one in runs.items()},
        "longest_gap_ms": {name: round(1e3 * max(one.gaps_s), 1) for name, one in runs.items()},
        "longest_first_token_ms": {name: round(1e3 * max(one.first_token_s), 1) for name, one in runs.items()},
        "tokens_per_s": {name: round(one.tokens / one.seconds, 1) for name, one in runs.items()},
        "answers": {name: len(one.answers) for name, one in runs.items()},
        "rebalance_s": {name: round(one.seconds - SETTLE_S, 1) for name, one in changes.items()},
        "failures": {name: one.failures[:3] for name, one in runs.items() if one.failures},
    }


async def load(target: Record, prompts: Sequence[str], until: Awaitable[object]) -> Run:
    """Streams completions until `until` has ended, and then to the end of those under way."""
    found, ended = Run(), asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        began = time.perf_counter()
        clients = [asyncio.create_task(_client(session, target, prompts, one, found, ended)) for one in range(STREAMS)]
        try:
            await until
        finally:
            ended.set()
        await asyncio.gather(*clients)
        found.seconds = time.perf_counter() - began
    return found


async def _client(
    session: aiohttp.ClientSession,
    target: Record,
    prompts: Sequence[str],
    number: int,
    found: Run,
    ended: asyncio.Event,
) -> None:
    """Each client begins at a prompt of its own and goes round them all."""
    turn = number * len(prompts) // STREAMS
    while not ended.is_set():
        prompt = turn % len(prompts)
        turn += 1
        answer = await complete(session, target, prompts, prompt, MAX_TOKENS)
        if answer.done:
            found.answers.append(answer)
        else:
            found.failures.append(answer.failure or answer.refused)
            await asyncio.sleep(0.1)


async def change(plan: Path) -> None:
    """The command, as a user gives it; raises ClusterError where it fails."""
    await asyncio.sleep(SETTLE_S / 2)
    command = [sys.executable, "-m", "expertmesh", "rebalance", str(plan), "--cluster", NAME, "--yes"]
    process = await asyncio.create_subprocess_exec(*command, env=os.environ, stdout=subprocess.DEVNULL)
    if await process.wait():
        raise ClusterError(f"{' '.join(command[2:])} ended with {process.returncode}")
    await asyncio.sleep(SETTLE_S / 2)


def write_config(artifact: Path) -> Path:
    http, grpc = local_ray.free_ports(2)
    config = ClusterConfig(
        name=NAME,
        model=ModelSection(artifact=artifact, name=MODEL),
        engine=EngineSection(max_model_len=512, kv_cache_gib=0.25),
        groups=_groups(BEFORE),
        server=ServerSection(http_port=http, grpc_port=grpc),
    )
    path = WORK / "cluster.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return path


def write_plan(artifact: Path) -> Path:
    path = WORK / "plan.json"
    path.write_text(plan_text(Plan(fingerprint=read_manifest(artifact).fingerprint, groups=_groups(AFTER))))
    return path


def _groups(experts: dict[str, str]) -> tuple[GroupSection, ...]:
    return tuple(GroupSection(name=name, experts=held) for name, held in experts.items())
