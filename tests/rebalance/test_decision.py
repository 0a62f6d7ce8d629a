"""When the controller acts."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from expertmesh.errors import ClusterError
from expertmesh.placement.plan import Plan
from expertmesh.rebalance.decision import Attempt, Limits, Look, decide
from expertmesh.rebalance.watch import Controller, Planned
from expertmesh.v1 import directory_pb2

LIMITS = Limits(threshold=0.1, cool_down_s=600)
LOOK = Look(now=10_000, rows=5000, cost_now=2.0, cost_planned=1.0, groups_changed=2)
GOOD, BAD = Attempt(9_900, succeeded=True), Attempt(9_900, succeeded=False)


def test_acts_on_a_gain_beyond_the_threshold() -> None:
    assert decide(LOOK, LIMITS, []).act
    assert decide(LOOK, LIMITS, [replace(GOOD, ended_at=9_300)]).act


@pytest.mark.parametrize(
    ("look", "attempts", "reason"),
    [
        (replace(LOOK, cost_planned=1.82), [], r"gain \+0.090, threshold 0.1"),
        (replace(LOOK, cost_planned=2.2), [], r"gain -0.100, threshold 0.1"),
        (replace(LOOK, rows=10), [], "10 rows in the window, 1000 are needed"),
        (replace(LOOK, groups_changed=0), [], "already as planned"),
        (replace(LOOK, cost_planned=math.nan), [], "no figure"),
        (replace(LOOK, cost_now=-math.inf), [], "no figure"),
        (replace(LOOK, cost_now=0.0), [], "no figure"),
        (LOOK, [GOOD], r"cool-down: 500 s left"),
        (LOOK, [BAD], r"1 failed: 1100 s left"),
        (LOOK, [GOOD, BAD, BAD], r"2 failed: 2300 s left"),
    ],
)
def test_waits(look: Look, attempts: list[Attempt], reason: str) -> None:
    verdict = decide(look, LIMITS, attempts)
    assert not verdict.act
    assert re.search(reason, verdict.reason), verdict.reason


def test_a_good_one_ends_the_backing_off_and_it_is_bounded() -> None:
    assert "500 s left" in decide(LOOK, LIMITS, [BAD, BAD, GOOD]).reason
    assert f"{600 * 2**5 - 100} s left" in decide(LOOK, LIMITS, [BAD] * 50).reason


class Scripted:
    """A subject whose plans gain `gain`, and whose attempts end as told."""

    def __init__(self, gain: float, outcomes: list[bool | str]) -> None:
        self.gain, self.outcomes, self.applied = gain, outcomes, 0
        self.rows = 5000
        self.others: Attempt | None = None

    def loads(self, window_s: float) -> directory_pb2.ExpertLoadReply:
        layers = [directory_pb2.LayerRows(layer=0, experts=[0], rows=[self.rows])] if self.rows else []
        return directory_pb2.ExpertLoadReply(window_s=window_s, layers=layers)

    def planned(self, loads: directory_pb2.ExpertLoadReply) -> Planned:
        plan = Plan.model_validate({"fingerprint": "f", "groups": [{"name": "a", "experts": "0"}]})
        return Planned(plan, 1.0, 1.0 - self.gain, 0.5, 0.9)

    def groups_changed(self, plan: Plan) -> int:
        return 1

    def last(self) -> Attempt | None:
        return self.others

    def apply(self, plan: Plan) -> bool:
        self.applied += 1
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, str):
            raise ClusterError(outcome)
        return outcome


def actions(subject: Scripted, times: list[float], *, observe: bool = False) -> list[str]:
    now = [0.0]
    controller = Controller(Limits(0.1, 600), 300, observe, lambda: now[0])
    found = []
    for time in times:
        now[0] = time
        found.append(controller.look(lambda: subject).action)
    return found


def test_observing_applies_nothing() -> None:
    subject = Scripted(0.3, [])
    assert actions(subject, [0, 60], observe=True) == ["would apply", "would apply"]
    assert subject.applied == 0


def test_applies_once_and_cools_down() -> None:
    subject = Scripted(0.3, [True, True])
    assert actions(subject, [0, 60, 599, 601]) == ["applied", "wait", "wait", "applied"]


def test_backs_off_after_one_that_failed() -> None:
    subject = Scripted(0.3, [False, "another rebalance is under way", True])
    looks = [0, 601, 1201, 1300, 3700]
    assert actions(subject, looks) == ["rolled back", "wait", "failed", "wait", "applied"]


def test_what_others_applied_counts_for_the_cool_down() -> None:
    subject = Scripted(0.3, [True])
    subject.others = Attempt(100, succeeded=True)
    assert actions(subject, [200, 701]) == ["wait", "applied"]


def test_without_rows_it_waits() -> None:
    subject = Scripted(0.3, [])
    subject.rows = 0
    assert actions(subject, [0]) == ["wait"]
