"""The policy as a function: bounds, steps, delays, sleep, and replicas that lie."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as some

from expertmesh.config import ScalingSection
from expertmesh.scaling.policy import BAND, Bounds, Decision, GroupLoad, Memory, ReplicaLoad, decide

AT_ONCE = ScalingSection(up_after_s=0, down_after_s=0)
WIDE = Bounds(1, 1000)
numbers = some.floats(allow_nan=True, allow_infinity=True) | some.floats(0, 1)
reports = some.builds(ReplicaLoad, some.just("r"), numbers, numbers, numbers, numbers, numbers)
honest = some.builds(
    ReplicaLoad, some.just("r"), some.floats(0, 5), some.floats(0, 1), some.floats(0, 500), some.floats(0, 1e6),
    some.floats(0, 1e4),
)  # fmt: skip
targets = some.builds(
    ScalingSection,
    target_busy=some.floats(0.05, 0.95),
    queue_wait_ms=some.floats(0.1, 1000),
    up_after_s=some.sampled_from([0.0, 2.0]),
    down_after_s=some.sampled_from([0.0, 60.0]),
    max_up_factor=some.floats(1.01, 10),
    max_up_step=some.integers(1, 50),
    max_down_step=some.integers(1, 50),
)
bounds = some.tuples(some.integers(0, 20), some.integers(1, 40)).map(lambda b: Bounds(min(b), max(b)))


def busy(share: float, **more: float) -> ReplicaLoad:
    return ReplicaLoad("r", 0.5, share, 0.0, 100.0 * share, 0.0)._replace(**more)


def group(
    *replicas: ReplicaLoad, now: float = 1000.0, target: int | None = None, running: int | None = None
) -> GroupLoad:
    count = len(replicas) if running is None else running
    return GroupLoad(now, count, count if target is None else target, replicas)


def first(load: GroupLoad, wanted: ScalingSection = AT_ONCE, within: Bounds = WIDE) -> Decision:
    """Of a group that has been there for long."""
    return decide(load, wanted, within, settled(load))[0]


def settled(load: GroupLoad) -> Memory:
    return Memory(since=0.0, ran=((load.now, load.running),), joined_at=0.0, last_row_at=load.now)


@pytest.mark.parametrize(
    ("shares", "asked"),
    [
        ([0.6], 1),
        ([0.65], 1),
        ([0.7], 2),
        ([1.0], 2),
        ([0.9, 0.9], 3),
        ([0.55, 0.55], 2),
        ([0.26, 0.26], 1),
        ([0.3, 0.3], 2),
        ([0.0] * 5, 1),
    ],
)
def test_replicas_follow_the_busy_share(shares: list[float], asked: int) -> None:
    assert first(group(*map(busy, shares))).asked == asked


def test_rows_that_wait_ask_for_more_where_there_is_work() -> None:
    waiting = busy(0.5, queue_wait_ms=30.0)
    assert first(group(waiting, waiting)).asked == 3
    assert first(group(busy(0.1, queue_wait_ms=1e6))).asked == 1
    assert first(group(*[busy(0.5, queue_wait_ms=1e6)] * 3)).asked == 6, "max_up_factor"


def test_a_wait_from_before_a_replica_joined_asks_for_no_more() -> None:
    load = group(*[busy(0.6, queue_wait_ms=1000.0)] * 2)
    assert decide(load, AT_ONCE, WIDE, settled(load)._replace(joined_at=load.now - 2))[0].asked == 2
    assert decide(load, AT_ONCE, WIDE, settled(load)._replace(joined_at=load.now - 7))[0].asked == 4
    assert decide(load, AT_ONCE, WIDE, settled(load)._replace(ran=((load.now, 1),)))[0].asked == 2, "it joined just now"


@pytest.mark.parametrize("away_s", [1, 3, 6])
def test_a_replica_that_comes_and_goes_does_not_hide_that_rows_wait(away_s: int) -> None:
    """It is there for 3 s each time; the group has had its two replicas for long."""
    one = busy(0.6, queue_wait_ms=1000.0)
    wanted, memory, target = ScalingSection(), settled(group(one, one)), 2
    for tenths in range(400):
        running = 1 if tenths % (10 * (3 + away_s)) < 10 * away_s else 2
        load = group(*[one] * running, now=1000 + tenths / 10, target=target)
        decision, memory = decide(load, wanted, WIDE, memory)
        target = max(target, decision.replicas)
    assert target > 2


def test_a_replica_that_is_back_after_long_has_joined() -> None:
    one = busy(0.6, queue_wait_ms=1000.0)
    _, memory = decide(group(one, one, now=0.0), AT_ONCE, WIDE, Memory())
    for now in range(1, 20):
        _, memory = decide(group(one, now=float(now), target=2), AT_ONCE, WIDE, memory)
    assert decide(group(one, one, now=20.0), AT_ONCE, WIDE, memory)[0].asked == 2


def test_a_group_stays_as_it_is_where_fewer_would_let_rows_wait_too_long() -> None:
    assert first(group(*[busy(0.2)] * 2)).asked == 1
    assert first(group(*[busy(0.2, queue_wait_ms=15.0)] * 2)).asked == 2


def test_the_load_must_ask_for_long_enough() -> None:
    wanted = ScalingSection(up_after_s=2, down_after_s=60)
    memory = Memory()
    for tenths in range(21):
        decision, memory = decide(group(busy(1.0), now=tenths / 10), wanted, WIDE, memory)
        assert decision.replicas == (1 if tenths < 20 else 2)

    memory, when = Memory(), list[float]()
    for tenths in range(1000):
        load = group(busy(1.0 if tenths == 300 else 0.1), busy(0.1), now=tenths / 10)
        decision, memory = decide(load, wanted, WIDE, memory)
        when += [load.now] if decision.replicas < 2 else []
    assert when[0] == pytest.approx(90.1), "one busy moment at 30 s counts for a minute"


def test_a_gap_in_the_reports_starts_the_wait_again() -> None:
    wanted = ScalingSection(up_after_s=2)
    _, memory = decide(group(busy(1.0), now=0.0), wanted, WIDE, Memory())
    _, memory = decide(group(busy(1.0, age_s=99.0), now=1.0), wanted, WIDE, memory)
    assert decide(group(busy(1.0), now=2.5), wanted, WIDE, memory)[0].replicas == 1


def test_each_step_waits_until_the_one_before_can_be_seen() -> None:
    wanted = ScalingSection(up_after_s=2, down_after_s=10, target_busy=0.1, max_up_factor=2)
    memory, target, ups = Memory(), 1, list[tuple[float, int]]()
    for tenths in range(100):
        load = group(busy(1.0), now=tenths / 10, target=target)
        decision, memory = decide(load, wanted, WIDE, memory)
        ups += [(load.now, decision.replicas)] if decision.replicas != target else []
        target = decision.replicas
    assert ups == [(2.0, 2), (4.0, 4), (6.0, 8), (8.0, 10)]
    memory, target, downs = Memory(), 4, list[tuple[float, int]]()
    for tenths in range(200):
        load = group(*[busy(0.0)] * target, now=tenths / 10)
        decision, memory = decide(load, wanted, WIDE, memory)
        downs += [(load.now, decision.replicas)] if decision.replicas != target else []
        target = decision.replicas
    assert downs == [(10.0, 3), (13.0, 2), (16.0, 1)]


def test_a_group_sleeps_after_long_enough_without_a_row_and_wakes_for_one() -> None:
    wanted, may_sleep = ScalingSection(idle_after_s=30), Bounds(0, 4)
    memory, target = Memory(), 1
    for second in range(100):
        rows = 1.0 if second == 20 else 0.0
        load = group(busy(0.0, rows_per_s=rows), now=float(second), target=target)
        decision, memory = decide(load, wanted, may_sleep, memory)
        if decision.replicas == 0:
            break
    assert second == 50
    asleep = GroupLoad(200.0, 0, 0, ())
    decision, memory = decide(asleep, wanted, may_sleep, memory)
    assert (decision.replicas, decision.reason) == (0, "asleep")
    decision, memory = decide(asleep._replace(wanted=True), wanted, may_sleep, memory)
    assert decision.replicas == 1
    decision, memory = decide(GroupLoad(230.0, 0, 1, ()), wanted, may_sleep, memory)
    assert decision.replicas == 1 and not decision.blind
    decision, memory = decide(group(busy(0.0, rows_per_s=0.0), now=300.0), wanted, may_sleep, memory)
    assert decision.replicas == 1, "idle counts from when it is awake"


@pytest.mark.parametrize("broken", ["queued", "silent", "stale"])
def test_a_group_of_which_not_all_is_known_to_be_idle_does_not_sleep(broken: str) -> None:
    idle = busy(0.0, rows_per_s=0.0)
    load = {
        "queued": group(idle, idle._replace(queued_rows=1.0)),
        "silent": group(idle, running=2),
        "stale": group(idle, idle._replace(age_s=99.0)),
    }[broken]
    memory = settled(load)._replace(last_row_at=0.0)
    assert decide(load, AT_ONCE, Bounds(0, 4), memory)[0].replicas >= 1
    assert decide(group(idle, idle), AT_ONCE, Bounds(0, 4), memory)[0].replicas == 0


LIES = [
    {"busy": math.nan},
    {"busy": 7.0},
    {"busy": -0.1},
    {"busy": math.inf},
    {"queue_wait_ms": 1e18},
    {"queue_wait_ms": math.nan},
    {"rows_per_s": math.inf},
    {"queued_rows": -1.0},
    {"queued_rows": math.nan},
    {"age_s": 60.0},
    {"age_s": math.nan},
    {"age_s": -5.0},
]


@pytest.mark.parametrize("lie", LIES)
def test_an_impossible_report_is_silence(lie: dict[str, float]) -> None:
    liar = busy(0.6, **lie)
    decision = first(group(busy(0.6), liar, busy(0.6)))
    assert (decision.replicas, decision.counted) == (3, 2)
    alone = first(group(liar), within=Bounds(0, 9))
    assert (alone.replicas, alone.blind) == (1, True)
    assert math.isnan(alone.busy) and math.isnan(alone.queue_wait_ms)


def test_a_lone_liar_that_keeps_to_what_is_possible_gets_one_step_and_no_more() -> None:
    """It calls itself overloaded for ever; each replica that joins is honest and idle."""
    liar, memory, target = busy(1.0, queue_wait_ms=3e6, queued_rows=1e18), Memory(), 1
    for second in range(300):
        load = group(liar, *[busy(0.0)] * (target - 1), now=float(second))
        decision, memory = decide(load, ScalingSection(), WIDE, memory)
        target = decision.replicas
    assert target <= 2


@given(reports=some.lists(reports, max_size=8), targets=targets, bounds=bounds, data=some.data())
def test_bounds_and_steps_hold_whatever_is_reported(
    reports: list[ReplicaLoad], targets: ScalingSection, bounds: Bounds, data: some.DataObject
) -> None:
    target = data.draw(some.integers(bounds.min_replicas, bounds.max_replicas))
    running, memory, now = data.draw(some.integers(0, 12)), Memory(), 0.0
    for _ in range(4):
        now += data.draw(some.floats(0, 100))
        decision, memory = decide(GroupLoad(now, running, target, tuple(reports)), targets, bounds, memory)
        assert bounds.min_replicas <= decision.replicas <= bounds.max_replicas
        largest = max(1, min(math.ceil(target * targets.max_up_factor), target + targets.max_up_step))
        assert decision.replicas <= largest
        slept = decision.replicas == 0
        assert slept or decision.replicas >= target - targets.max_down_step
        target = decision.replicas


@given(honest=some.lists(honest, min_size=1, max_size=12), targets=targets, which=some.data())
def test_more_load_never_asks_for_fewer(
    honest: list[ReplicaLoad], targets: ScalingSection, which: some.DataObject
) -> None:
    number = which.draw(some.integers(0, len(honest) - 1))
    more = honest[number]._replace(
        busy=which.draw(some.floats(honest[number].busy, 1)),
        queue_wait_ms=which.draw(some.floats(honest[number].queue_wait_ms, 1000)),
    )
    less, grown = group(*honest), group(*honest[:number], more, *honest[number + 1 :])
    assert first(less, targets).asked <= first(grown, targets).asked
    assert first(less, targets).replicas <= first(grown, targets).replicas


@given(calm=some.lists(some.floats(0, 0.6), min_size=1, max_size=12), lie=honest, target=some.floats(0.3, 0.9))
def test_one_liar_moves_the_result_by_its_own_share(calm: list[float], lie: ReplicaLoad, target: float) -> None:
    """What it says of its busy share counts as one replica's, what it says of waiting does not count at all."""
    wanted = ScalingSection(target_busy=target, up_after_s=0, down_after_s=0, max_up_factor=100, max_down_step=1000)
    told = lie._replace(rows_per_s=1.0)
    true = [busy(share, rows_per_s=1.0) for share in calm]
    asked = [first(group(*true, told._replace(busy=share, queue_wait_ms=0.0)), wanted).asked for share in (0.0, 1.0)]
    found = first(group(*true, told), wanted).asked
    assert asked[0] <= found <= asked[1]
    assert asked[1] - asked[0] <= 1 / (target * (1 - BAND)) + BAND * (len(calm) + 1) + 1


@given(reports=some.lists(reports, max_size=6), target=some.integers(1, 30))
def test_without_a_report_that_counts_nothing_changes(reports: list[ReplicaLoad], target: int) -> None:
    silent = [one._replace(age_s=1e9) for one in reports]
    load = GroupLoad(1000.0, max(1, len(silent)), target, tuple(silent))
    assert first(load, within=Bounds(0, 30)).replicas == target


def test_the_word_of_few_replicas_grows_no_group() -> None:
    liar, target = busy(1.0, queue_wait_ms=1e6), 50
    memory = settled(group(liar, running=50))
    for now in range(1000, 1300):
        load = group(liar, now=float(now), running=target, target=target)
        decision, memory = decide(load, ScalingSection(), Bounds(1, 1000), memory)
        target = decision.replicas
    assert target == 50 and "only 1 of 50 replicas report" in decision.reason
    assert first(group(liar, running=2)).asked == 4, "half of them is enough"
    assert first(group(busy(0.1), running=50)).asked < 50, "a group may shrink"


def test_the_memory_stays_small() -> None:
    wanted, memory = ScalingSection(down_after_s=86400), Memory()
    for tenths in range(20_000):
        share = 0.5 + 0.5 * math.sin(tenths / 50)
        _, memory = decide(group(*[busy(share)] * 4, now=tenths / 10), wanted, WIDE, memory)
    assert len(memory.least) + len(memory.most) <= 20
