"""Who waits, and what forms a batch: what waits for one layer, from whatever stream it came, in fair turns."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from expert_service.executor import Pairs
from expert_service.turns import Turns, may_wait
from expertmesh.v1 import expert_pb2 as pb


class Caller(Protocol):
    """The stream that a job came on."""

    @property
    def gone(self) -> bool:
        """Nobody waits for its answers any more."""
        ...

    def answer(self, response: pb.DispatchResponse, rows: int) -> None:
        """Sends a response to a request of `rows` rows; called on the server's event loop."""
        ...


@dataclass(frozen=True, eq=False)
class Job:
    """One dispatch that waits for its layer. Times are seconds of a monotonic clock."""

    caller: Caller
    request_id: int
    layer: int
    hidden_states: torch.Tensor
    """[R, H]"""
    pairs: Pairs
    output_dtype: torch.dtype
    arrived_at: float
    deadline: float
    """When nobody waits for the answer any more."""
    checked: bool = False
    """It came with a checksum, and its answer gets one."""

    @property
    def rows(self) -> int:
        return self.hidden_states.shape[0]


@dataclass(frozen=True)
class Batch:
    """Jobs of one layer to compute together, and those that were taken too late to be computed."""

    layer: int
    jobs: list[Job]
    expired: list[Job]

    @property
    def rows(self) -> int:
        return sum(job.rows for job in self.jobs)


Waiting = tuple[int, int, Job]
"""Its turn, its number in the order of arrival, the job."""


class Batcher:
    """One queue per layer. Any thread submits; the executor's thread takes.

    `max_queued_rows` bounds the rows that wait, over all layers, as `may_wait` says; `max_batch_rows` those of one
    batch, which holds at least one job however large that is.
    """

    def __init__(self, max_queued_rows: int, max_batch_rows: int) -> None:
        self.max_queued_rows = max_queued_rows
        self.queued_rows = 0
        self._max_batch_rows = max_batch_rows
        self._queues: dict[int, list[Waiting]] = {}
        """Layer -> a heap."""
        self._turns = Turns()
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False

    def submit(self, job: Job) -> pb.Code.ValueType:
        """CODE_OK and the job waits; CODE_RESOURCE_EXHAUSTED if it does not fit; CODE_UNAVAILABLE once closed."""
        with self._changed:
            if self._closed:
                return pb.CODE_UNAVAILABLE
            turns, caller = self._turns, job.caller
            own_rows, callers = turns.rows_of(caller), turns.callers_with(caller)
            if not may_wait(job.rows, own_rows, callers, self.queued_rows, self.max_queued_rows):
                return pb.CODE_RESOURCE_EXHAUSTED
            self.queued_rows += job.rows
            waiting = turns.join(caller, job.rows), next(self._numbers), job
            heapq.heappush(self._queues.setdefault(job.layer, []), waiting)
            self._changed.notify()
            return pb.CODE_OK

    def take(self, clock: Callable[[], float]) -> Batch | None:
        """The next batch: of the layer whose first job has the least turn, in the order of turns. Waits for one; None
        once closed and empty. Jobs of streams that are gone are dropped."""
        with self._changed:
            while not self._queues and not self._closed:
                self._changed.wait()
            if not self._queues:
                return None
            layer = min(self._queues, key=lambda layer: self._queues[layer][0][:2])
            return self._form(layer, clock())

    def _form(self, layer: int, now: float) -> Batch:
        queue = self._queues[layer]
        turn = queue[0][0]
        batch = Batch(layer, [], [])
        rows = 0
        while queue and (rows == 0 or rows + queue[0][2].rows <= self._max_batch_rows):
            job = heapq.heappop(queue)[2]
            self.queued_rows -= job.rows
            self._turns.leave(job.caller, job.rows)
            if job.caller.gone:
                continue
            if now > job.deadline:
                batch.expired.append(job)
                continue
            batch.jobs.append(job)
            rows += job.rows
        if not queue:
            del self._queues[layer]
        self._turns.advance(turn if self._queues else None)
        return batch

    def oldest(self) -> float | None:
        """When the job came that has waited longest; None where nothing waits."""
        with self._changed:
            return min((job.arrived_at for queue in self._queues.values() for _, _, job in queue), default=None)

    def close(self) -> None:
        """Nothing more is accepted; what waits is still taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
