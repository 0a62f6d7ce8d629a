"""Whose rows are next where several routers wait, in both languages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from marks import native_core

from expert_service.turns import Turns, may_wait

ROWS = st.integers(0, 40)


def served(turns: Turns, jobs: list[tuple[int, int, str]]) -> str:
    """Takes the job of the least (turn, number), each of 10 rows; whose it was."""
    jobs.sort()
    turn, _, caller = jobs.pop(0)
    turns.leave(caller, 10)
    turns.advance(turn)
    return caller


def test_who_floods_gets_no_more_than_who_sends_again_once_answered() -> None:
    turns, jobs = Turns(), list[tuple[int, int, str]]()
    for number in range(100):
        jobs.append((turns.join("flood", 10), number, "flood"))
    order = []
    for number in range(100, 120):
        jobs.append((turns.join("modest", 10), number, "modest"))
        order += [served(turns, jobs) for _ in range(2)]
    assert order.count("modest") == 20


def test_an_idle_caller_saves_nothing_up() -> None:
    turns, jobs = Turns(), list[tuple[int, int, str]]()
    for number in range(100):
        jobs.append((turns.join("busy", 10), number, "busy"))
    for _ in range(50):
        served(turns, jobs)
    for number in range(100, 150):
        jobs.append((turns.join("late", 10), number, "late"))
    order = [served(turns, jobs) for _ in range(40)]
    assert 19 <= order.count("late") <= 21


def test_large_messages_cost_turns_by_their_rows() -> None:
    turns = Turns()
    assert [turns.join("large", 30) for _ in range(3)] == [0, 30, 60]
    assert [turns.join("small", 10) for _ in range(3)] == [0, 10, 20]


def test_a_full_queue_takes_an_equal_share_of_who_has_less() -> None:
    assert may_wait(10, 90, 1, 90, 100)
    assert not may_wait(11, 90, 1, 90, 100)
    assert may_wait(10, 40, 2, 140, 100)
    assert not may_wait(11, 40, 2, 140, 100)
    assert may_wait(90, 0, 2, 100, 100)  # a first message, of whatever size
    assert not may_wait(1, 0, 9, 200, 100)
    assert not may_wait(101, 0, 1, 0, 100)


@given(st.lists(st.tuples(st.integers(0, 5), ROWS), max_size=200), st.integers(1, 60))
def test_never_do_more_than_twice_as_many_rows_wait(jobs: list[tuple[int, int]], limit: int) -> None:
    turns, queued = Turns(), 0
    for caller, rows in jobs:
        if may_wait(rows, turns.rows_of(caller), turns.callers_with(caller), queued, limit):
            turns.join(caller, rows)
            queued += rows
    assert queued <= 2 * limit


STEPS = st.lists(st.one_of(st.tuples(st.integers(1, 6), ROWS), st.just("take"), st.just("end")), max_size=120)


@given(STEPS, st.integers(1, 200))
def test_the_native_turns_are_the_same(steps: list[tuple[int, int] | str], limit: int) -> None:
    native = native_core()
    turns, others, waiting = Turns(), native.Turns(), list[tuple[int, int, int, int]]()
    for number, step in enumerate(steps):
        if isinstance(step, tuple):
            caller, rows = step
            facts = rows, turns.rows_of(caller), turns.callers_with(caller), sum(one[3] for one in waiting), limit
            assert facts[1:3] == (others.rows_of(caller), others.callers_with(caller))
            assert may_wait(*facts) == native.may_wait(*facts)
            turn = turns.join(caller, rows)
            assert turn == others.join(caller, rows)
            waiting.append((turn, number, caller, rows))
        elif waiting:
            turn, _, caller, rows = min(waiting)
            taken = waiting if step == "end" else [min(waiting)]
            for _, _, caller, rows in list(taken):
                turns.leave(caller, rows)
                others.leave(caller, rows)
            waiting = [one for one in waiting if one not in taken]
            for each in (turns, others):
                each.advance(turn if waiting else None)
