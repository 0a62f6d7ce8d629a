"""The life of a client process: get ready, begin when told, tell what happens, end; over a pipe, wherever it runs."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

from expertmesh.errors import ExpertMeshError
from loadtest.client import Client, Job, Report
from loadtest.config import RunConfig
from loadtest.expert_tier import ExpertTier
from loadtest.openai_target import OpenAIEndpoint
from loadtest.precise_loop import run_precisely
from loadtest.schedule import Schedule
from loadtest.target import Clock, Target
from loadtest.texts import MADE_UP, Texts

REPORT_S = 0.5
COLLECT_EVERY = 50_000
"""Allocations between collections of garbage; each stops the loop for some milliseconds."""


@dataclass(frozen=True)
class Ready:
    pass


@dataclass(frozen=True)
class Begin:
    unix_s: float
    """When the run's time is 0; processes on other nodes share no other clock."""


@dataclass(frozen=True)
class Stop:
    pass


@dataclass(frozen=True)
class Done:
    last: Report


@dataclass(frozen=True)
class Failed:
    message: str


Told = Ready | Report | Done | Failed
"""What a client process says."""


def work(connection: Connection, job: Job) -> None:
    """Does the job and ends; an ExpertMeshError is told as Failed, anything else raised."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, 20, 20)
    try:
        run_precisely(_work(connection, job))
    except ExpertMeshError as error:
        connection.send(Failed(str(error)))


def make_texts(config: RunConfig) -> Texts | None:
    """None for an expert tier, which is sent no text."""
    return Texts(config.text, config.seed) if config.target.kind == "openai" else None


def make_schedule(config: RunConfig, repeat: int, texts: Texts | None) -> Schedule:
    return Schedule(config, repeat, texts.domains if texts is not None else (MADE_UP,))


def make_target(job: Job, texts: Texts | None) -> Target:
    if texts is not None:
        return OpenAIEndpoint(job.config, job.endpoint, texts, job.repeat)
    assert job.endpoint.directory is not None
    return ExpertTier(job.config, job.endpoint.directory, job.shard, job.endpoint.tls)


async def _work(connection: Connection, job: Job) -> None:
    texts = make_texts(job.config)
    schedule, target = make_schedule(job.config, job.repeat, texts), make_target(job, texts)
    await target.open()
    try:
        connection.send(Ready())
        loop = asyncio.get_running_loop()
        orders: asyncio.Queue[Begin | Stop] = asyncio.Queue()
        loop.add_reader(connection.fileno(), lambda: orders.put_nowait(connection.recv()))
        begin = await orders.get()
        if isinstance(begin, Begin):
            clock = Clock(time.monotonic() + begin.unix_s - time.time())
            await _run(connection, Client(job, target, schedule, clock), orders)
        loop.remove_reader(connection.fileno())
    finally:
        await target.close()


async def _run(connection: Connection, client: Client, orders: asyncio.Queue[Begin | Stop]) -> None:
    running, ordered = asyncio.create_task(client.run()), asyncio.create_task(orders.get())
    while not running.done():
        await asyncio.wait({running, ordered}, timeout=REPORT_S, return_when=asyncio.FIRST_COMPLETED)
        if ordered.done() and not running.done():
            client.stop()
            await asyncio.wait({running})
        elif not running.done():
            # a full pipe must not stop the loop
            await asyncio.to_thread(connection.send, client.report())
    ordered.cancel()
    await running
    await asyncio.to_thread(connection.send, Done(client.report()))
