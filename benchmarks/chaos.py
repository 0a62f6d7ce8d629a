"""What faults cost the clients: the demo model on a local Ray with two routers and three groups of two replicas each.

Streams arrive open-loop, RATE per second, greedy, at the same moments in every phase; the model is in fp32, so that
another batch or grouping does not change a token; replicas are emulated devices. The first phase and the last have no
fault. Each of the others lasts a minute at least and repeats one fault, SETTLE_S after all replicas are listed again
(a second more where nothing was killed):

- `kill_replica`: SIGKILL to one of a group's two replicas; `hang_replica`: SIGSTOP to it for FOR_S;
  `partition_replica`: nothing goes to its port or comes from it for FOR_S, silently, while the directory hears from it;
- `corrupt_replica`: one more replica in a group for FOR_S, whose answers lack a row, are of another type or hold a NaN;
- `kill_only_replica`: SIGKILL to the replica of a group that has one; `restart_directory`: SIGKILL to the directory;
- `all_at_once`: a kill, a hang, a partition, each in another group, and the directory's restart.

`stall_ms` of one fault is the longest gap between two pieces of one answer from the fault until SETTLE_S after all
replicas were back, beyond the 99th percentile of the phases without a fault; `first_token_ms_max` is the longest wait
for a first token meanwhile. Ray Serve LLM sends what came within 50 ms as one piece.

`throughput_ratio` compares tokens/s of the requests that were sent in the minute from LEAD_S on, when the first fault
comes, with those of the same requests without a fault, a mean of two: all tokens that came, by the time until the last
of these answers had ended, as `vllm bench serve` counts. (Tokens that came within the minute would tell of its edges:
three answers are open at its first.) With arrivals open-loop, requests that fail or a backlog at the end lower it, not
answers that are slower meanwhile: `answer_time_ratio` compares the mean time of these answers.

`overload`, OVERLOADS times: closed-loop clients, as many as are admitted, find the peak; then thrice as many requests
per second as the first peak is arrive for OVERLOAD_S. `throughput_ratio` is of tokens/s of whole answers to the mean of
the peaks before and after, the median of all times. The clients begin one after another: those that begin at once stay
in step, so that their prompts are computed together, which no arrivals of their own are. `failed_requests` are those
with another error than 429; stalls are those of the usual load from 5 s after an overload on.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import psutil

from benchmarks.measure import percentile
from benchmarks.streamed import Answer, complete, differing, expectations, make_artifact, wake_at_once
from examples import demo
from expertmesh.artifact.manifest import read_manifest
from expertmesh.cluster import launch, local_ray, processes
from expertmesh.cluster.record import Record
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.commands.up import bring_up
from expertmesh.config import ClusterConfig
from expertmesh.deployment import serve_config
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError
from expertmesh.v1 import directory_pb2, expert_pb2
from loadtest.config import Corruption, Fault
from loadtest.faults import find_victim, inflict
from loadtest.partition import cut_off

WORK = Path(__file__).parents[1] / ".bench" / "chaos"
NAME, MODEL = "bench-chaos", "demo"
GROUPS = {"a": "0-4", "b": "5-10", "c": "11-15"}
REPLICAS, ROUTERS = 2, 2
DEVICE = {"teraflops": 1.0, "memory_gb_per_s": 50.0, "overhead_us": 300.0}
RATE, MAX_TOKENS, PROMPTS, SEED = 1.0, 48, 16, 7
MAX_REQUESTS = 24
KILLS, HANGS, PARTITIONS, CORRUPTIONS, KILLS_OF_ONE, RESTARTS = 20, 5, 5, 6, 3, 3
FOR_S, SETTLE_S, LEAD_S, MINUTE_S, TAIL_S = 5.0, 2.0, 5.0, 60.0, 5.0
OVERLOADS, OVERLOAD_S, PEAK_S, AFTER_S, BACK_S = 3, 60.0, 20.0, 20.0, 5.0
APART_S = 0.15
"""Between two clients' beginnings: an answer at the peak takes so long 24 times."""
READY_S, RETURN_S = 600.0, 120.0
WHAT: Sequence[Corruption] = ("rows", "dtype", "nan")
"""Is wrong with corrupt answers, in turn; the cluster has no checksums."""

WITHOUT = ("without", "without_again")
"""Phases without a fault, the first and the last."""

Span = tuple[float, float]
"""Moments of time.perf_counter."""


@dataclass
class Phase:
    began: float = field(default_factory=time.perf_counter)
    answers: list[Answer] = field(default_factory=list)
    faults: list[Span] = field(default_factory=list)
    """From each fault until all is as before, and SETTLE_S more."""

    def gaps_s(self, spans: Iterable[Span]) -> list[float]:
        spans = list(spans)
        return [
            length
            for answer in self.answers
            for ended, length in answer.gaps()
            if any(begin <= ended and ended - length <= end for begin, end in spans)
        ]

    def of_the_minute(self) -> list[Answer]:
        """To requests that were sent within MINUTE_S from LEAD_S on."""
        return [one for one in self.answers if LEAD_S <= one.sent - self.began < LEAD_S + MINUTE_S]

    def tokens_per_s(self) -> float:
        """Of the minute's answers, until the last of them had ended."""
        answers = self.of_the_minute()
        ended = max(one.ended for one in answers)
        return sum(len(one.tokens) for one in answers) / (ended - self.began - LEAD_S)

    def answer_s(self) -> float:
        """From sent to ended, mean of the minute's answers, whole or not."""
        return statistics.mean(one.ended - one.sent for one in self.of_the_minute())


Inflict = Callable[[Phase], Awaitable[None]]


def run(cluster: str | None) -> dict[str, object]:
    """`cluster` is not used: it starts its own."""
    return run_with(Chaos)


def run_with(made: type[Chaos]) -> dict[str, object]:
    config = configure(make_artifact(WORK))
    path = WORK / "cluster.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    started = bring_up(launch.read_plan(path), None, READY_S)
    try:
        at_once = wake_at_once()
        found = asyncio.run(made(started, config).run())
    finally:
        launch.stop(started)
    return found | {"device": "emulated", "client_wakes_at_once": at_once}


def configure(artifact: Path) -> ClusterConfig:
    http, grpc = local_ray.free_ports(2)
    bounds = {"min_replicas": REPLICAS, "max_replicas": REPLICAS, "num_cpus": 1, "emulated": DEVICE}
    routers = {"min_replicas": ROUTERS, "max_replicas": ROUTERS, "max_requests": MAX_REQUESTS}
    return ClusterConfig.model_validate(
        {
            "name": NAME,
            "model": {"artifact": str(artifact), "name": MODEL},
            "engine": {"max_model_len": 512, "kv_cache_gib": 0.25, "enforce_eager": True, **routers},
            "groups": [{"name": name, "experts": experts, **bounds} for name, experts in GROUPS.items()],
            "server": {"http_port": http, "grpc_port": grpc},
        }
    )


@dataclass
class Chaos:
    target: Record
    config: ClusterConfig
    prompts: Sequence[str] = field(default_factory=lambda: demo.prompts()[:PROMPTS])
    session: aiohttp.ClientSession = field(init=False)
    overloads: ClassVar[bool] = True

    async def run(self) -> dict[str, object]:
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as self.session:
            await self.under_load(lambda phase: asyncio.sleep(10))  # warm-up
            phases = {WITHOUT[0]: await self.under_load(self.nothing)}
            for name, (inflict_all, why_not) in self.phases().items():
                if why_not:
                    say(f"{name} is skipped: {why_not}")
                    phases[name] = Phase()
                    continue
                phases[name] = await self.under_load(inflict_all)
            phases[WITHOUT[1]] = await self.under_load(self.nothing)
            found = figures(phases)
            if self.overloads:
                found["overload"] = await self.overload(phases[WITHOUT[0]])
            return found

    def phases(self) -> dict[str, tuple[Inflict, str]]:
        """What each phase does, and why it cannot be done here."""
        no_partition = why_no_partition()
        return {
            "kill_replica": (self.each(KILLS, "kill"), ""),
            "hang_replica": (self.each(HANGS, "hang"), ""),
            "partition_replica": (self.each(PARTITIONS, "partition"), no_partition),
            "corrupt_replica": (self.each(CORRUPTIONS, "corrupt"), ""),
            "kill_only_replica": (self.kill_the_only, ""),
            "restart_directory": (self.restart_directory, ""),
            "all_at_once": (self.all_at_once, no_partition),
        }

    async def under_load(self, inflict_all: Inflict) -> Phase:
        phase, ended = Phase(), asyncio.Event()
        load = asyncio.create_task(self.open_loop(phase.answers, RATE, ended))
        try:
            await inflict_all(phase)
        finally:
            ended.set()
            await load
        return phase

    async def open_loop(self, answers: list[Answer], rate: float, ended: asyncio.Event) -> None:
        """Requests at moments that the seed decides; returns when the last answer is whole."""
        draw, due, open_now = random.Random(SEED), time.perf_counter(), []
        for number in range(10**9):
            due += draw.expovariate(rate)
            try:
                await asyncio.wait_for(ended.wait(), max(0.0, due - time.perf_counter()))
                break
            except TimeoutError:
                open_now.append(asyncio.create_task(self.ask(number, answers)))
        await asyncio.gather(*open_now)

    async def ask(self, number: int, answers: list[Answer]) -> None:
        answers.append(await complete(self.session, self.target, self.prompts, number % PROMPTS, MAX_TOKENS))

    async def nothing(self, phase: Phase) -> None:
        await self.last_a_minute(phase)

    def each(self, times: int, kind: str) -> Inflict:
        """One fault after another, going round groups and replicas."""

        async def inflict_all(phase: Phase) -> None:
            await asyncio.sleep(LEAD_S)
            for number in range(times):
                group = list(GROUPS)[number % len(GROUPS)]
                what = WHAT[number % len(WHAT)]
                await self.hit(phase, fault(kind, group, number // len(GROUPS) % REPLICAS, what))
            await self.last_a_minute(phase)

        return inflict_all

    async def kill_the_only(self, phase: Phase) -> None:
        """Group c has one replica meanwhile."""
        group = list(GROUPS)[-1]
        await self.bound(group, 1)
        await asyncio.sleep(LEAD_S)
        for _ in range(KILLS_OF_ONE):
            await self.hit(phase, fault("kill", group, 0))
        await self.last_a_minute(phase)
        await self.bound(group, REPLICAS)

    async def restart_directory(self, phase: Phase) -> None:
        await asyncio.sleep(LEAD_S)
        for _ in range(RESTARTS):
            await self.hit(phase, Fault(at_s=0, kind="restart_directory"))
        await self.last_a_minute(phase)

    async def all_at_once(self, phase: Phase) -> None:
        await asyncio.sleep(LEAD_S)
        kinds = dict(zip(GROUPS, ("kill", "hang", "partition"), strict=True))
        all_of_them = [fault(kind, group, 0) for group, kind in kinds.items()]
        await self.hit(phase, *all_of_them, Fault(at_s=0, kind="restart_directory"))
        await self.last_a_minute(phase)

    async def last_a_minute(self, phase: Phase) -> None:
        """TAIL_S longer, so that other requests come while the minute's last are answered."""
        await asyncio.sleep(max(0.0, phase.began + LEAD_S + MINUTE_S + TAIL_S - time.perf_counter()))

    async def hit(self, phase: Phase, *faults: Fault) -> None:
        """All of them at once; returns when everything is as before."""
        table = await asyncio.to_thread(list_table, self.target.directory)
        killed = {one.kind for one in faults} & {"kill", "restart_directory"}
        victims = [(one, find_victim(one, self.target)) for one in faults]
        began = time.perf_counter()
        stop = threading.Event()
        await asyncio.gather(*(asyncio.to_thread(inflict, one, victim, stop) for one, victim in victims))
        dead = {victim.name for one, victim in victims if one.kind == "kill"}
        old = table.directory_id if any(one.kind == "restart_directory" for one in faults) else ""
        await self.until_back(len(table.replicas), dead, old)
        await self.until_whole({victim.process.pid for one, victim in victims if one.kind.startswith("restart_")})
        await asyncio.sleep(SETTLE_S if killed else SETTLE_S + 1)
        phase.faults.append((began, time.perf_counter()))
        (begin, end) = phase.faults[-1]
        longest = max([0.0, *phase.gaps_s([(begin, end)])])
        what = " ".join(f"{one.kind} {victim.name}" for one, victim in victims)
        say(f"{what}: back after {end - begin - SETTLE_S:.1f} s, longest gap {1e3 * longest:.0f} ms so far")

    async def until_back(self, count: int, dead: set[str], old_directory: str) -> None:
        def back(table: directory_pb2.Table) -> bool:
            ready = {one.replica_id for one in table.replicas if one.state == expert_pb2.REPLICA_STATE_READY}
            return len(ready) >= count and not ready & dead and table.directory_id != old_directory

        deadline = time.perf_counter() + RETURN_S
        while time.perf_counter() < deadline:
            try:
                if back(await asyncio.to_thread(list_table, self.target.directory)):
                    return
            except ClusterError:
                pass  # restarts
            await asyncio.sleep(0.2)
        raise ClusterError(f"{count} replicas are not back after {RETURN_S:.0f} s")

    async def until_whole(self, ended: set[int]) -> None:
        """Waits until Ray Serve says that all applications and proxies run, without these processes."""
        if not ended:
            return
        api, deadline = ServeApi(self.target.dashboard, self.target.token), time.perf_counter() + RETURN_S
        while time.perf_counter() < deadline:
            try:
                if is_whole(await asyncio.to_thread(api.details), ended):
                    return
            except ClusterError:
                pass  # the controller restarts
            await asyncio.sleep(0.5)
        raise ClusterError(f"Ray Serve's applications do not run after {RETURN_S:.0f} s")

    async def bound(self, group: str, replicas: int) -> None:
        """Both bounds of one group; returns when it has so many replicas."""
        bounds = {"min_replicas": replicas, "max_replicas": replicas}
        groups = [one.model_copy(update=bounds) if one.name == group else one for one in self.config.groups]
        changed = self.config.model_copy(update={"groups": tuple(groups)})
        wanted = serve_config(changed, read_manifest(self.config.model.artifact))
        await asyncio.to_thread(ServeApi(self.target.dashboard, self.target.token).deploy, wanted)
        deadline = time.perf_counter() + RETURN_S
        while time.perf_counter() < deadline:
            table = await asyncio.to_thread(list_table, self.target.directory)
            if sum(one.group == group for one in table.replicas) == replicas:
                return
            await asyncio.sleep(0.5)
        raise ClusterError(f"group {group} does not have {replicas} replicas after {RETURN_S:.0f} s")

    async def overload(self, without: Phase) -> dict[str, object]:
        peaks, goodputs = [await self.peak()], []
        before, sampled = memory_gib(self.target), [0.0]
        during, after = [], []
        for _ in range(OVERLOADS):
            say(f"peak {peaks[-1]:.0f} tokens/s; overload")
            phase, ended = Phase(), asyncio.Event()
            load = asyncio.create_task(self.open_loop(phase.answers, 3 * peaks[0] / MAX_TOKENS, ended))
            while time.perf_counter() < phase.began + OVERLOAD_S:
                await asyncio.sleep(2)
                sampled.append(await asyncio.to_thread(memory_gib, self.target))
            ended.set()
            await load
            goodputs.append(goodput(phase))
            during += phase.answers
            after.append(await self.under_load(lambda phase: asyncio.sleep(BACK_S + AFTER_S)))
            peaks.append(await self.peak())
        usual_ms = 1e3 * percentile(without.gaps_s([everything(without)]), 0.99)
        gaps_s = [gap for one in after for gap in one.gaps_s([(one.began + BACK_S, one.began + BACK_S + AFTER_S)])]
        answers = [*during, *(one for phase in after for one in phase.answers)]
        ratios = [each / statistics.mean(both) for each, both in zip(goodputs, pairwise(peaks), strict=True)]
        return {
            "failed_requests": sum(bool(one.failure) for one in answers),
            "failures": failures(one for one in answers if one.failure),
            "refused_requests": sum(bool(one.refused) for one in during),
            "requests": len(during),
            "tokens_differing": differing(during, expectations(without.answers)),
            "peak_tokens_per_s": [round(peak, 1) for peak in peaks],
            "throughput_ratio": round(statistics.median(ratios), 3),
            "throughput_ratios": [round(ratio, 3) for ratio in ratios],
            "memory_gib": {"before": round(before, 2), "most": round(max(sampled), 2)},
            "gap_p99_ms": {"usual": round(usual_ms, 1), "after": round(1e3 * percentile(gaps_s, 0.99), 1)},
            "stall_ms_p50": round(1e3 * percentile(gaps_s, 0.5) - usual_ms, 1),
            "stall_ms_max": round(1e3 * max(gaps_s) - usual_ms, 1),
        }

    async def peak(self) -> float:
        """Tokens/s of closed-loop clients, as many as are admitted."""
        answers: list[Answer] = []
        until = time.perf_counter() + BACK_S + PEAK_S

        async def client(number: int) -> None:
            await asyncio.sleep(number * APART_S)
            while time.perf_counter() < until:
                await self.ask(number, answers)
                number += MAX_REQUESTS

        await asyncio.gather(*(client(number) for number in range(MAX_REQUESTS)))
        return sum(n for one in answers for when, n in one.pieces if until - PEAK_S <= when < until) / PEAK_S


def is_whole(details: dict[str, Any], ended: set[int]) -> bool:
    applications = details.get("applications", {}).values()
    replicas = [replica for one in applications for made in one["deployments"].values() for replica in made["replicas"]]
    proxies = details.get("proxies", {}).values()
    return (
        bool(applications)
        and all(one["status"] == "RUNNING" for one in applications)
        and all(made["status"] == "HEALTHY" for one in applications for made in one["deployments"].values())
        and all(proxy["status"] == "HEALTHY" for proxy in proxies)
        and not ended & {replica["pid"] for replica in replicas}
    )


def fault(kind: str, group: str, replica: int, what: Corruption = "rows") -> Fault:
    length = None if kind == "kill" else FOR_S
    told = {"at_s": 0, "kind": kind, "group": group, "replica": replica, "for_s": length, "what": what}
    return Fault.model_validate(told)


def why_no_partition() -> str:
    """Empty where partitions can be made."""
    try:
        with cut_off(local_ray.free_ports(1)[0]):
            return ""
    except ClusterError as error:
        return str(error)


def memory_gib(cluster: Record) -> float:
    """Resident memory of all processes of the cluster, shared pages counted once each process."""
    total = 0
    for process in processes.running(cluster.marker or ""):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue  # has just ended
    return total / 2**30


def goodput(overload: Phase) -> float:
    """Tokens/s of whole answers, from BACK_S on."""
    ended = [(one.ended - overload.began, len(one.tokens)) for one in overload.answers if one.done]
    return sum(tokens for when, tokens in ended if BACK_S <= when < OVERLOAD_S) / (OVERLOAD_S - BACK_S)


def everything(phase: Phase) -> Span:
    return phase.began, max(one.ended for one in phase.answers)


def failures(answers: Iterable[Answer]) -> list[str]:
    return sorted({one.failure or one.refused for one in answers if not one.done})[:3]


def figures(phases: dict[str, Phase]) -> dict[str, Any]:
    plain = [phase for name, phase in phases.items() if name in WITHOUT]
    answers = [one for phase in plain for one in phase.answers]
    expected = expectations(answers)
    gaps_s = [gap for phase in plain for gap in phase.gaps_s([everything(phase)])]
    p99_s = percentile(gaps_s, 0.99)
    tokens_per_s = statistics.mean(phase.tokens_per_s() for phase in plain)
    answer_s = statistics.mean(phase.answer_s() for phase in plain)
    found: dict[str, Any] = {
        "without": {
            "requests": len(answers),
            "failed_requests": sum(not one.done for one in answers),
            "tokens_differing": differing(answers, expected),
            "gap_p99_ms": round(1e3 * p99_s, 1),
            "stall_ms_max": round(1e3 * (max(gaps_s) - p99_s), 1),
            "tokens_per_s": [round(phase.tokens_per_s(), 2) for phase in plain],
            "answer_s": [round(phase.answer_s(), 3) for phase in plain],
        }
    }
    for name, phase in phases.items():
        if name in WITHOUT:
            continue
        if not phase.faults:
            found[name] = {"skipped": why_no_partition()}
            continue
        stalls = [1e3 * (max([p99_s, *phase.gaps_s([span])]) - p99_s) for span in phase.faults]
        first = [one.pieces[0][0] - one.sent for one in phase.answers if one.pieces]
        found[name] = {
            "faults": len(phase.faults),
            "requests": len(phase.answers),
            "failed_requests": sum(not one.done for one in phase.answers),
            "failures": failures(phase.answers),
            "tokens_differing": differing(phase.answers, expected),
            "stall_ms_p50": round(percentile(stalls, 0.5), 1),
            "stall_ms_max": round(max(stalls), 1),
            "stall_ms": [round(one) for one in stalls],
            "first_token_ms_max": round(1e3 * max(first), 1),
            "back_s": [round(end - begin - SETTLE_S, 1) for begin, end in phase.faults],
            "throughput_ratio": round(phase.tokens_per_s() / tokens_per_s, 4),
            "answer_time_ratio": round(phase.answer_s() / answer_s, 4),
        }
    return found


def say(text: str) -> None:
    print(f"chaos: {text}", file=sys.stderr, flush=True)
