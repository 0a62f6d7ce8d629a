"""The thread that computes: takes batches, runs them, hands the answers on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import numpy
import torch

from expert_service.batcher import Batch, Batcher, Caller, Job
from expert_service.endpoint import prepare_executor_thread
from expert_service.executor import Executor, Pairs
from expert_service.load import LoadMeter
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.checksum import answer_checksum
from expertmesh.wire.tensors import encode

logger = logging.getLogger(__name__)

Answer = tuple[Caller, pb.DispatchResponse, int]
"""Who asked, the response, and the request's rows."""


class Runtime:
    """One thread that runs one batch after another until the batcher is closed and empty.

    `deliver` is called on that thread, once per batch, with the answers to its jobs.
    """

    def __init__(
        self,
        batcher: Batcher,
        executor: Executor,
        meter: LoadMeter,
        deliver: Callable[[list[Answer]], None],
        num_threads: int = 1,
    ) -> None:
        self._batcher = batcher
        self.executor = executor
        self._meter = meter
        self._deliver = deliver
        self._num_threads = num_threads
        self._thread = threading.Thread(target=self._loop, name="expert-executor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def load(self) -> pb.Load:
        now = time.monotonic()
        meter = self._meter
        return pb.Load(
            queued_rows=self._batcher.queued_rows,
            busy=meter.busy(now),
            rows_total=meter.rows_total,
            rows_per_s=meter.rows_per_s(now),
        )

    def queue_wait(self) -> tuple[int, int]:
        """Median and 95th percentile of how long requests waited, microseconds."""
        oldest = self._batcher.oldest()
        return self._meter.waits.quantiles(time.monotonic(), oldest)

    def _loop(self) -> None:
        prepare_executor_thread(self._num_threads)
        while (batch := self._batcher.take(time.monotonic)) is not None:
            now = time.monotonic()
            self._meter.waits.took(now, [now - job.arrived_at for job in (*batch.jobs, *batch.expired)])
            answers = [
                _refuse(job, pb.CODE_DEADLINE_EXCEEDED, "the timeout passed in the queue") for job in batch.expired
            ]
            if batch.jobs:
                answers += self._compute(batch)
            load = self.load()
            for _, response, _ in answers:
                response.load.CopyFrom(load)
            self._deliver(answers)

    def _compute(self, batch: Batch) -> list[Answer]:
        hidden_states, pairs = join(batch.jobs)
        began = time.monotonic()
        self._meter.begin(began)
        try:
            output = self.executor.run(batch.layer, hidden_states, pairs)
        except Exception as error:  # whatever fails in a kernel becomes a status
            logger.exception("layer %d: a batch of %d rows failed", batch.layer, batch.rows)
            self._meter.end(time.monotonic(), batch.layer, 0, pairs.experts[:0])
            return [_refuse(job, pb.CODE_INTERNAL, f"{type(error).__name__}: {error}") for job in batch.jobs]
        ended = time.monotonic()
        self._meter.end(ended, batch.layer, batch.rows, pairs.experts)
        compute_us = round((ended - began) * 1e6)
        parts = torch.split(output, [job.rows for job in batch.jobs])
        return [
            (job.caller, _respond(job, part, batch.rows, began, compute_us), job.rows)
            for job, part in zip(batch.jobs, parts, strict=True)
        ]


def join(jobs: list[Job]) -> tuple[torch.Tensor, Pairs]:
    """The rows of all jobs under one another, and their pairs."""
    if len(jobs) == 1:
        return jobs[0].hidden_states, jobs[0].pairs
    starts = numpy.cumsum([0, *(job.rows for job in jobs[:-1])], dtype=numpy.int32)
    pairs = Pairs(
        rows=numpy.concatenate([job.pairs.rows + start for job, start in zip(jobs, starts, strict=True)]),
        experts=numpy.concatenate([job.pairs.experts for job in jobs]),
        weights=numpy.concatenate([job.pairs.weights for job in jobs]),
    )
    return torch.cat([job.hidden_states for job in jobs]), pairs


def _respond(job: Job, output: torch.Tensor, batch_rows: int, began: float, compute_us: int) -> pb.DispatchResponse:
    timings = pb.Timings(queue_us=round((began - job.arrived_at) * 1e6), compute_us=compute_us, batch_rows=batch_rows)
    response = pb.DispatchResponse(
        id=job.request_id,
        status=pb.Status(code=pb.CODE_OK),
        output=encode(output.to(job.output_dtype)),
        timings=timings,
    )
    if job.checked:
        response.checksum = answer_checksum(response)
    return response


def _refuse(job: Job, code: pb.Code.ValueType, message: str) -> Answer:
    response = pb.DispatchResponse(id=job.request_id, status=pb.Status(code=code, message=message))
    if job.checked:
        response.checksum = answer_checksum(response)
    return job.caller, response, job.rows
