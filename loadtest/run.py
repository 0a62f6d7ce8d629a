"""A run from config to records: checks first, then repeats, with samples and faults alongside."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType

from rich.console import Console

from expertmesh.errors import ClusterError
from loadtest.client import Job, request_of
from loadtest.client_process import Begin, Done, Ready, Stop, make_schedule, make_target, make_texts
from loadtest.config import RunConfig
from loadtest.endpoint import Endpoint, find_endpoint
from loadtest.expert_tier import rows_asked
from loadtest.faults import Injector
from loadtest.fleet import Fleet, Launch, LocalMember
from loadtest.openai_target import OpenAIEndpoint
from loadtest.progress import Progress, Standing
from loadtest.records import ExpertRows, FaultRecord, RequestRecord, Run, Sample
from loadtest.sampling import Sampler
from loadtest.target import Clock, Request

WARMUP_INDEX = 10**15
"""Sessions of the warm-up are numbered apart."""
STOP_TIMEOUT_S = 15.0


@dataclass
class Repeat:
    """What one repeat has brought."""

    records: list[RequestRecord] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    faults: list[FaultRecord] = field(default_factory=list)
    duration_s: float = 0.0


class Checked:
    """A run that can begin: everything it names exists, the target answers and is warm."""

    def __init__(self, config: RunConfig, launch: Launch = LocalMember) -> None:
        """Raises ExpertMeshError with one line for whatever stands in the way."""
        self.config, self.launch = config, launch
        self.texts = make_texts(config)
        self.schedule = make_schedule(config, 0, self.texts)
        self.endpoint = find_endpoint(config)
        self.endpoint = asyncio.run(self._warm_up())
        self.injector = Injector(config, self.endpoint)
        self.sampler = Sampler(config, self.endpoint)

    async def _warm_up(self) -> Endpoint:
        """The endpoint as it is now known; raises ClusterError where a first request is not answered."""
        job = Job(self.config, self.endpoint, 0, 0, 1)
        target = make_target(job, self.texts)
        await target.open()
        try:
            if isinstance(target, OpenAIEndpoint):
                await target.check()
                job = replace(job, endpoint=replace(self.endpoint, model=target.model))
            for number in range(self.config.client.warmup_requests):
                session = self.schedule.session("warm-up", WARMUP_INDEX + number, 0.0)
                request = replace(request_of(session, 0, 0.0, ()), cancel_after=None)
                outcome = await target.prepare(request).run(Clock(time.monotonic()))
                if outcome.status != "ok":
                    raise ClusterError(f"warm-up request: {outcome.status}: {outcome.error}")
        finally:
            await target.close()
        return job.endpoint

    def close(self) -> None:
        self.sampler.close()


Judge = Callable[[Repeat, Standing], bool]
"""Whether to end a repeat now, asked after each report."""


def run_repeat(checked: Checked, repeat: int, progress: Progress, stopped: threading.Event, judge: Judge) -> Repeat:
    """One repeat, until its last answer, or until `stopped` is set or `judge` says so."""
    config = checked.config
    shards = config.client.processes
    fleet = Fleet([Job(config, checked.endpoint, repeat, shard, shards) for shard in range(shards)], checked.launch)
    found = Repeat()
    try:
        begin_s = config.client.start_after_s
        clock, begin = Clock(time.monotonic() + begin_s), Begin(time.time() + begin_s)
        standing = Standing(checked.schedule.spans, repeat, config.repeats)
        checked.sampler.start(clock, repeat)
        checked.injector.start(clock, repeat)
        try:
            fleet.send(begin)
            _follow(fleet, clock, found, standing, progress, lambda: stopped.is_set() or judge(found, standing))
        finally:
            found.faults += checked.injector.stop()
            found.samples += checked.sampler.stop()
        found.duration_s = max(0.0, clock.now())
    finally:
        fleet.close()
    return found


def _follow(
    fleet: Fleet, clock: Clock, found: Repeat, standing: Standing, progress: Progress, ended: Callable[[], bool]
) -> None:
    stop_by_s: float | None = None
    while len(fleet.done) < fleet.size:
        for shard, told in fleet.receive():
            if isinstance(told, Ready):
                continue
            report = told.last if isinstance(told, Done) else told
            standing.add(shard, report)
            found.records += report.records
            lag = Sample(standing.repeat, clock.now(), "client_loop_lag_s", f"process {shard}", report.loop_lag_s)
            found.samples.append(lag)
        standing.now_s = max(0.0, clock.now())
        progress.show(standing)
        if stop_by_s is None and ended():
            fleet.send(Stop())
            stop_by_s = time.monotonic() + STOP_TIMEOUT_S
        if stop_by_s is not None and time.monotonic() > stop_by_s:
            return


def never(_repeat: Repeat, _standing: Standing) -> bool:
    return False


def execute(config: RunConfig, console: Console, launch: Launch = LocalMember) -> Run:
    """All repeats of a run; Ctrl-C ends it early, with what came until then. Raises ExpertMeshError before any traffic
    where something is wrong."""
    with console.status("checking the target"):
        checked = Checked(config, launch)
    try:
        rows_before = _expert_rows(checked, console)
        started_at, repeats = time.time(), []
        with interruptible() as stopped, Progress(console) as progress:
            for repeat in range(config.repeats):
                if repeat and stopped.wait(config.pause_s):
                    break
                checked.schedule = make_schedule(config, repeat, checked.texts)
                repeats.append(run_repeat(checked, repeat, progress, stopped, never))
                if stopped.is_set():
                    break
        return Run(
            stages=checked.schedule.spans,
            records=tuple(sorted((r for one in repeats for r in one.records), key=_order)),
            samples=tuple(sample for one in repeats for sample in one.samples),
            faults=tuple(fault for one in repeats for fault in one.faults),
            repeats=len(repeats),
            interrupted=stopped.is_set(),
            started_at=started_at,
            durations_s=tuple(one.duration_s for one in repeats),
            client_processes=config.client.processes,
            notes=tuple(checked.schedule.notes),
            skew=_skew(checked, repeats, rows_before, console),
        )
    finally:
        checked.close()


def _order(record: RequestRecord) -> tuple[int, float, int]:
    return record.repeat, record.scheduled_s, record.index


def _expert_rows(checked: Checked, console: Console) -> dict[tuple[int, int], int]:
    if checked.endpoint.cluster is None:
        return {}
    with console.status("reading the experts' rows"):
        return checked.sampler.expert_rows()


def _skew(
    checked: Checked, repeats: list[Repeat], before: dict[tuple[int, int], int], console: Console
) -> tuple[ExpertRows, ...]:
    """Rows per expert: as its replicas counted, or, of an expert tier that is not ours, as they were sent."""
    rows = {key: total - before.get(key, 0) for key, total in _expert_rows(checked, console).items()}
    directory, tls = checked.endpoint.directory, checked.endpoint.tls
    if not rows and checked.config.target.kind == "experts" and directory is not None:
        rows = rows_asked(checked.config, directory, _answered(checked, repeats), tls)
    return tuple(ExpertRows(layer, expert, count) for (layer, expert), count in sorted(rows.items()))


def _answered(checked: Checked, repeats: list[Repeat]) -> Iterator[Request]:
    for number, repeat in enumerate(repeats):
        schedule = make_schedule(checked.config, number, checked.texts)
        for record in repeat.records:
            if record.status == "ok":
                session = schedule.session(record.stage, record.index, record.scheduled_s)
                yield request_of(session, 0, record.scheduled_s, ())


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second interrupts as usual."""
    stopped = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopped.set()
        restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        restore()
