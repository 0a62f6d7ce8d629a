"""A client's share of the traffic: on an event loop of its own, it keeps the schedule and writes down what happens."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from loadtest.config import RunConfig
from loadtest.endpoint import Endpoint
from loadtest.records import RequestRecord, Status
from loadtest.schedule import ClosedStage, OpenStage, Schedule, Session
from loadtest.target import Clock, Exchange, Outcome, Request, Target

PROBE_S = 0.02
RETRY_S = 0.5
"""How long a user of a closed loop pauses after an error, lest an endpoint that refuses is flooded."""


@dataclass(frozen=True)
class Job:
    """What a client process is to do."""

    config: RunConfig
    endpoint: Endpoint
    repeat: int
    shard: int
    shards: int


@dataclass
class Report:
    """News from a client process since its last report, and how it stands."""

    records: list[RequestRecord] = field(default_factory=list)
    sent: int = 0
    """Since the run began."""
    open: int = 0
    """Requests under way."""
    loop_lag_s: float = 0.0
    """The worst delay of the event loop since the last report: how wrong the times may be."""


class Client:
    """Runs the job's share of the schedule; all of it on one event loop."""

    def __init__(self, job: Job, target: Target, schedule: Schedule, clock: Clock) -> None:
        self._job, self._target, self._schedule, self._clock = job, target, schedule, clock
        self._tasks: set[asyncio.Task[object]] = set()
        self._report = Report()
        self._main: asyncio.Task[None] | None = None
        self._given_up: tuple[Status, str] | None = None

    def report(self) -> Report:
        """What is new since the last call."""
        found = replace(self._report)
        self._report = Report(sent=found.sent, open=found.open)
        return found

    async def run(self) -> None:
        """Until every request has ended, or has been given up `drain_s` after the last stage."""
        self._main = asyncio.current_task()
        probe = asyncio.create_task(self._probe())
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._offer()
                drain_s = self._job.config.client.drain_s
                if self._tasks:
                    await asyncio.wait(self._tasks, timeout=drain_s)
                self._given_up = self._given_up or ("timeout", f"no end within {drain_s:g} s after the last stage")
                for task in self._tasks:
                    task.cancel()
        except asyncio.CancelledError:
            if self._given_up is None:
                raise
        finally:
            probe.cancel()

    def stop(self) -> None:
        """Ends the run now; what is open becomes `unfinished`."""
        self._given_up = ("unfinished", "")
        if self._main is not None:
            self._main.cancel()

    async def _offer(self) -> None:
        shard, shards = self._job.shard, self._job.shards
        for stage in self._schedule.stages:
            if isinstance(stage, ClosedStage):
                for user in range(shard, stage.users, shards):
                    self._start(self._user(stage, user))
            else:
                await self._feed(stage)
            await self._sleep_until(stage.span.end_s)

    async def _feed(self, stage: OpenStage) -> None:
        for session in self._schedule.sessions(stage, self._job.shard, self._job.shards):
            exchange = self._target.prepare(request_of(session, 0, session.scheduled_s, ()))
            await self._sleep_until(session.scheduled_s)
            self._start(self._follow(session, exchange))

    async def _user(self, stage: ClosedStage, user: int) -> None:
        """One session after another until the stage ends."""
        number, due_s = 0, stage.span.start_s
        while due_s < stage.span.end_s:
            await self._sleep_until(due_s)
            index = stage.first_index + number * stage.users + user
            session = self._schedule.session(stage.span.name, index, due_s)
            exchange = self._target.prepare(request_of(session, 0, due_s, ()))
            went_well = await self._follow(session, exchange)
            number += 1
            due_s = self._clock.now() + (stage.think_s if went_well else max(stage.think_s, RETRY_S))

    async def _follow(self, session: Session, exchange: Exchange) -> bool:
        """All turns of a session; it ends with the first that is not answered."""
        due_s = session.scheduled_s
        history: tuple[tuple[str, str], ...] = ()
        for turn in range(len(session.turns)):
            if turn:
                exchange = self._target.prepare(request_of(session, turn, due_s, history))
                await self._sleep_until(due_s)
            outcome = await self._exchange(session, turn, due_s, exchange)
            if outcome.status != "ok":
                return False
            history = (*history, (outcome.asked, outcome.answered))
            due_s = outcome.done_s + session.think_s
        return True

    async def _exchange(self, session: Session, turn: int, due_s: float, exchange: Exchange) -> Outcome:
        self._report.sent += 1
        self._report.open += 1
        try:
            outcome = await exchange.run(self._clock)
        except asyncio.CancelledError:
            outcome = exchange.partial(self._clock)
            if self._given_up is not None:
                outcome = replace(outcome, status=self._given_up[0], error=self._given_up[1])
            self._record(session, turn, due_s, outcome)
            raise
        finally:
            self._report.open -= 1
        self._record(session, turn, due_s, outcome)
        return outcome

    def _record(self, session: Session, turn: int, due_s: float, outcome: Outcome) -> None:
        self._report.records.append(
            RequestRecord(
                repeat=self._job.repeat,
                stage=session.stage,
                index=session.index,
                turn=turn,
                domain=session.domain,
                scheduled_s=due_s,
                sent_s=outcome.sent_s,
                token_times=outcome.token_times,
                done_s=outcome.done_s,
                prompt_tokens=outcome.prompt_tokens,
                output_tokens=outcome.output_tokens,
                status=outcome.status,
                error=outcome.error,
                process=self._job.shard,
            )
        )

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _sleep_until(self, at_s: float) -> None:
        """At least one turn of the loop, so that a client that is behind still reads its answers."""
        await asyncio.sleep(max(0.0, at_s - self._clock.now()))

    async def _probe(self) -> None:
        while True:
            due_s = self._clock.now() + PROBE_S
            await asyncio.sleep(PROBE_S)
            self._report.loop_lag_s = max(self._report.loop_lag_s, self._clock.now() - due_s)


def request_of(session: Session, turn: int, due_s: float, history: tuple[tuple[str, str], ...]) -> Request:
    """One turn of a session, due at `due_s`."""
    plan = session.turns[turn]
    return Request(
        index=session.index,
        turn=turn,
        seed=session.seed,
        scheduled_s=due_s,
        prompt_tokens=plan.prompt_tokens,
        output_tokens=plan.output_tokens,
        cancel_after=plan.cancel_after,
        domain=session.domain,
        prefix=session.prefix if turn == 0 else None,
        prefix_tokens=session.prefix_tokens if turn == 0 else 0,
        blocks=session.blocks,
        history=history,
    )
