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
import torch
from safetensors.torch import load_file, save_file

from benchmarks.measure import percentile
from examples import demo
from expertmesh.artifact.manifest import read_manifest
from expertmesh.artifact.prepare import prepare
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

    gaps_s: list[float] = field(default_factory=list)
    """Between two pieces of one answer."""
    first_token_s: list[float] = field(default_factory=list)
    answers: dict[int, list[list[int]]] = field(default_factory=dict)
    """Prompt -> the tokens of each answer to it."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(len(answer) for answers in self.answers.values() for answer in answers)

    @property
    def stall_ms(self) -> float:
        return 1e3 * (max(self.gaps_s) - percentile(self.gaps_s, 0.99))


def run(cluster: str | None) -> dict[str, object]:
    """`cluster` is not used: it starts its own."""
    artifact = make_artifact()
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


def wake_at_once() -> bool:
    """Real-time priority for this process, the clients, where that is allowed: what is measured shall be when the
    server sent, not when a busy machine let the client read. What it starts has the usual priority."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        return False
    return True


def figures(without: Run, changes: dict[str, Run]) -> dict[str, object]:
    expected = {prompt: answers[0] for prompt, answers in without.answers.items()}
    runs = {"without": without, **changes}
    return {
        "failed_requests": sum(len(one.failures) for one in changes.values()),
        "stall_ms": round(max(one.stall_ms for one in changes.values()), 1),
        "tokens_differing": sum(differing(one, expected) for one in changes.values()),
        "stall_ms_without": round(without.stall_ms, 1),
        "tokens_differing_without": differing(without, expected),
        "gap_p99_ms": {name: round(1e3 * percentile(one.gaps_s, 0.99), 1) for name, one in runs.items()},
        "longest_gap_ms": {name: round(1e3 * max(one.gaps_s), 1) for name, one in runs.items()},
        "longest_first_token_ms": {name: round(1e3 * max(one.first_token_s), 1) for name, one in runs.items()},
        "tokens_per_s": {name: round(one.tokens / one.seconds, 1) for name, one in runs.items()},
        "answers": {name: sum(map(len, one.answers.values())) for name, one in runs.items()},
        "rebalance_s": {name: round(one.seconds - SETTLE_S, 1) for name, one in changes.items()},
        "failures": {name: one.failures[:3] for name, one in runs.items() if one.failures},
    }


def differing(run: Run, expected: dict[int, list[int]]) -> int:
    """Tokens from the first that differs on, over all answers."""
    total = 0
    for prompt, answers in run.answers.items():
        wanted = expected[prompt]
        for answer in answers:
            same = next((at for at, (a, b) in enumerate(zip(answer, wanted, strict=False)) if a != b), None)
            total += abs(len(answer) - len(wanted)) if same is None else len(wanted) - same
    return total


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
        try:
            found.answers.setdefault(prompt, []).append(await _answer(session, target, prompts[prompt], found))
        except (aiohttp.ClientError, ClusterError, TimeoutError) as error:
            found.failures.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.1)


async def _answer(session: aiohttp.ClientSession, target: Record, prompt: str, found: Run) -> list[int]:
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    last = time.perf_counter()
    async with session.post(f"{target.http}/v1/completions", json=body) as response:
        if response.status != 200:
            raise ClusterError(f"{response.status} {(await response.text())[:200]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "choices" not in chunk:
                raise ClusterError(line.decode()[:200])
            new = [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]
            if not new:
                continue
            now = time.perf_counter()
            (found.gaps_s if tokens else found.first_token_s).append(now - last)
            tokens += new
            last = now
    if len(tokens) != MAX_TOKENS:
        raise ClusterError(f"an answer of {len(tokens)} tokens instead of {MAX_TOKENS}")
    return tokens


async def change(plan: Path) -> None:
    """The command, as a user gives it; raises ClusterError where it fails."""
    await asyncio.sleep(SETTLE_S / 2)
    command = [sys.executable, "-m", "expertmesh", "rebalance", str(plan), "--cluster", NAME, "--yes"]
    process = await asyncio.create_subprocess_exec(*command, env=os.environ, stdout=subprocess.DEVNULL)
    if await process.wait():
        raise ClusterError(f"{' '.join(command[2:])} ended with {process.returncode}")
    await asyncio.sleep(SETTLE_S / 2)


def make_artifact() -> Path:
    """The demo's checkpoint in fp32 and its artifact, made where they are not there yet."""
    checkpoint, artifact = WORK / "checkpoint", WORK / "artifact"
    if not (artifact / "manifest.json").exists():
        checkpoint.mkdir(parents=True, exist_ok=True)
        for path in demo.CHECKPOINT.glob("*.json"):
            (checkpoint / path.name).write_bytes(path.read_bytes())
        config = json.loads((demo.CHECKPOINT / "config.json").read_text()) | {"dtype": "float32"}
        (checkpoint / "config.json").write_text(json.dumps(config))
        tensors = load_file(demo.CHECKPOINT / "model.safetensors")
        wide = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
        save_file(wide, checkpoint / "model.safetensors", metadata={"format": "pt"})
        prepare(checkpoint, artifact)
    return artifact


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
