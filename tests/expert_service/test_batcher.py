from __future__ import annotations

import threading

import numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from expert_service.batcher import Batch, Batcher, Job
from expert_service.executor import Pairs
from expert_service.runtime import join
from expertmesh.v1 import expert_pb2 as pb


class Asker:
    gone = False

    def answer(self, response: pb.DispatchResponse, rows: int) -> None: ...


def job(
    layer: int, rows: int = 1, arrived_at: float = 0, deadline: float = float("inf"), caller: Asker | None = None
) -> Job:
    pairs = Pairs(
        numpy.arange(rows, dtype=numpy.int32), numpy.zeros(rows, dtype=numpy.int32), numpy.ones(rows, numpy.float32)
    )
    return Job(
        caller or Asker(), 0, layer, torch.full((rows, 2), float(layer)), pairs, torch.float32, arrived_at, deadline
    )


def take(batcher: Batcher, now: float = 0) -> Batch:
    batch = batcher.take(lambda: now)
    assert batch is not None
    return batch


def test_everything_that_waits_for_a_layer_forms_one_batch() -> None:
    batcher = Batcher(100, 100)
    jobs = [job(3, 2, 0.1), job(5, 1, 0.2), job(3, 4, 0.3)]
    for each in jobs:
        assert batcher.submit(each) == pb.CODE_OK
    first = take(batcher)
    assert (first.layer, first.jobs, first.rows) == (3, [jobs[0], jobs[2]], 6)
    assert batcher.queued_rows == 1
    assert take(batcher).jobs == [jobs[1]]
    assert batcher.queued_rows == 0


def test_layers_of_one_caller_or_equal_ones_come_in_the_order_of_arrival() -> None:
    batcher = Batcher(100, 2)
    for layer in (1, 1, 2, 3, 1, 2):
        batcher.submit(job(layer))
    assert [take(batcher).layer for _ in range(4)] == [1, 2, 3, 1]


def test_a_batch_holds_at_most_its_rows_but_at_least_one_job() -> None:
    batcher = Batcher(100, 4)
    for rows in [3, 1, 1, 9, 2]:
        batcher.submit(job(0, rows))
    assert [take(batcher).rows for _ in range(4)] == [4, 1, 9, 2]


def test_what_does_not_fit_is_refused_and_leaves_no_trace() -> None:
    batcher, asker = Batcher(4, 4), Asker()
    assert batcher.submit(job(0, 3, caller=asker)) == pb.CODE_OK
    assert batcher.submit(job(1, 2, caller=asker)) == pb.CODE_RESOURCE_EXHAUSTED
    assert batcher.submit(job(1, 1, caller=asker)) == pb.CODE_OK
    assert batcher.queued_rows == 4
    take(batcher)
    assert batcher.submit(job(1, 3, caller=asker)) == pb.CODE_OK


def test_callers_take_turns_in_a_batch_and_between_layers() -> None:
    batcher, flood, modest = Batcher(100, 4), Asker(), Asker()
    for layer in (1, 1, 1, 2, 2, 2):
        batcher.submit(job(layer, 2, caller=flood))
    jobs = [job(2, 2, caller=modest), job(1, 2, caller=modest)]
    for each in jobs:
        batcher.submit(each)
    order = [[(one.layer, one.caller is modest) for one in take(batcher).jobs] for _ in range(4)]
    assert order == [[(1, False), (1, False)], [(2, True), (2, False)], [(1, True), (1, False)], [(2, False)] * 2]


def test_what_came_too_late_is_not_computed() -> None:
    batcher = Batcher(100, 4)
    late, timely = job(0, 4, deadline=1.0), job(0, 4, deadline=3.0)
    batcher.submit(late)
    batcher.submit(timely)
    batch = take(batcher, now=2.0)
    assert (batch.jobs, batch.expired) == ([timely], [late])


def test_nobody_computes_for_a_stream_that_is_gone() -> None:
    batcher, asker = Batcher(100, 100), Asker()
    batcher.submit(job(0, 4, caller=asker))
    batcher.submit(job(0, 1))
    asker.gone = True
    assert take(batcher).rows == 1
    assert batcher.queued_rows == 0


def test_once_closed_it_refuses_but_gives_what_it_has() -> None:
    batcher = Batcher(100, 100)
    batcher.submit(job(0))
    batcher.close()
    assert batcher.submit(job(0)) == pb.CODE_UNAVAILABLE
    assert take(batcher).rows == 1
    assert batcher.take(lambda: 0) is None


def test_a_waiting_thread_wakes_for_a_job_and_for_the_end() -> None:
    batcher = Batcher(100, 100)
    taken: list[Batch | None] = []
    thread = threading.Thread(target=lambda: taken.extend(batcher.take(lambda: 0) for _ in range(2)))
    thread.start()
    batcher.submit(job(7))
    while not taken:
        thread.join(0.01)
    batcher.close()
    thread.join(10)
    assert [batch and batch.layer for batch in taken] == [7, None]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=40), st.integers(1, 8), st.integers(1, 60))
def test_every_accepted_job_is_taken_once_and_in_order(jobs: list[tuple[int, int]], max_batch: int, limit: int) -> None:
    batcher, asker = Batcher(limit, max_batch), Asker()
    accepted: list[Job] = []
    for arrived_at, (layer, rows) in enumerate(jobs):
        each = job(layer, rows, arrived_at, caller=asker)
        if batcher.submit(each) == pb.CODE_OK:
            accepted.append(each)
        assert batcher.queued_rows == sum(waiting.rows for waiting in accepted) <= limit
    batcher.close()
    batches = []
    while (batch := batcher.take(lambda: 0)) is not None:
        assert batch.rows <= max_batch or len([each for each in batch.jobs if each.rows]) == 1
        batches.append(batch)
    for layer in range(4):
        in_order = [each for batch in batches if batch.layer == layer for each in batch.jobs]
        assert in_order == [each for each in accepted if each.layer == layer]
    assert batcher.queued_rows == 0


def test_jobs_are_joined_with_their_rows_shifted() -> None:
    hidden_states, pairs = join([job(1, 2), job(2, 0), job(3, 1)])
    assert hidden_states.tolist() == [[1, 1], [1, 1], [3, 3]]
    assert pairs.rows.tolist() == [0, 1, 2] and pairs.rows.dtype == numpy.int32
