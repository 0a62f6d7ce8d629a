"""What `chaos` makes of answers: made ones, whose stalls and losses are known."""

from __future__ import annotations

from benchmarks.chaos import BACK_S, LEAD_S, MINUTE_S, OVERLOAD_S, Phase, figures, goodput
from benchmarks.streamed import Answer

TOKENS = [3, 1, 4, 1]


def answer(sent: float, gaps_s: list[float], tokens: list[int] = TOKENS, failure: str = "") -> Answer:
    """The first token comes 0.1 s after it was sent."""
    made = Answer(prompt=0, sent=sent, tokens=tokens, failure=failure)
    now = sent + 0.1
    for gap_s in [0.0, *gaps_s]:
        now += gap_s
        made.pieces.append((now, 1))
    return made


def steady() -> Phase:
    """One answer a second, a token each 0.05 s."""
    return Phase(0.0, [answer(float(second), [0.05] * 3) for second in range(int(LEAD_S + MINUTE_S))])


def test_a_stall_counts_for_the_fault_it_follows() -> None:
    phase = steady()
    phase.answers[10] = answer(10.0, [0.05, 0.35, 0.05])
    phase.answers[20] = answer(20.0, [0.05, 0.95, 0.05])
    phase.answers[40] = answer(40.0, [2.0, 0.05, 0.05])  # long after any fault
    phase.faults = [(10.2, 13.0), (19.0, 25.0), (30.0, 31.0)]
    found = figures({"without": steady(), "kill_replica": phase})
    assert found["without"]["gap_p99_ms"] == 50
    assert found["kill_replica"]["stall_ms"] == [300, 900, 0]
    assert (found["kill_replica"]["stall_ms_p50"], found["kill_replica"]["stall_ms_max"]) == (300, 900)
    assert found["kill_replica"]["first_token_ms_max"] == 100
    assert (found["kill_replica"]["failed_requests"], found["kill_replica"]["tokens_differing"]) == (0, 0)


def test_failures_and_other_tokens_count() -> None:
    phase = steady()
    phase.answers[10] = answer(10.0, [0.05] * 3, [3, 1, 9, 1])
    phase.answers[11] = answer(11.0, [0.05], [3, 1], failure="ClientError: gone")
    phase.faults = [(10.0, 12.0)]
    found = figures({"without": steady(), "hang_replica": phase})["hang_replica"]
    assert (found["failed_requests"], found["failures"]) == (1, ["ClientError: gone"])
    assert found["tokens_differing"] == 2


def after_a_fault(phase: Phase) -> dict[str, float]:
    phase.faults = [(LEAD_S, LEAD_S + 1)]
    return figures({"without": steady(), "kill_replica": phase})["kill_replica"]


def test_throughput_is_that_of_the_minute_after_the_first_fault() -> None:
    phase = steady()
    del phase.answers[10:16]
    assert after_a_fault(phase)["throughput_ratio"] == 0.9


def test_how_much_is_open_at_the_minutes_begin_does_not_count() -> None:
    phase = steady()
    last_before = int(LEAD_S) - 1
    phase.answers[last_before] = answer(last_before, [0.8] * 3)
    assert after_a_fault(phase)["throughput_ratio"] == 1


def test_a_backlog_at_the_minutes_end_counts() -> None:
    phase = steady()
    phase.answers[-1] = answer(LEAD_S + MINUTE_S - 1, [3.0, 2.0, 0.05])
    found = after_a_fault(phase)
    usual_s, with_it_s = MINUTE_S - 1 + 0.25, MINUTE_S - 1 + 5.15
    assert found["throughput_ratio"] == round(usual_s / with_it_s, 4)
    assert found["answer_time_ratio"] == round((59 * 0.25 + 5.15) / (60 * 0.25), 4)


def test_slower_answers_show_in_their_time_alone() -> None:
    phase = steady()
    phase.answers[10:40] = [answer(float(second), [0.15] * 3) for second in range(10, 40)]
    found = after_a_fault(phase)
    assert (found["throughput_ratio"], found["answer_time_ratio"]) == (1, round((0.25 + 0.55) / 2 / 0.25, 4))


def test_goodput_is_of_whole_answers_that_end_within_the_overload() -> None:
    overload = Phase(0.0, [answer(float(second), [0.05] * 3) for second in range(int(OVERLOAD_S) + 5)])
    assert goodput(overload) == len(TOKENS)
    overload.answers[10].failure = "ClientError: gone"
    overload.answers[20].refused = "429"
    assert goodput(overload) == len(TOKENS) * (1 - 2 / (OVERLOAD_S - BACK_S))
