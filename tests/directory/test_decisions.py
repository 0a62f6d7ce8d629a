from __future__ import annotations

import math

import pytest

from expertmesh.directory.decisions import FORGOTTEN_AFTER_S, MAX_CHANGES, Decisions
from expertmesh.errors import WireError
from expertmesh.v1 import directory_pb2 as pb


def decision(group: str = "g", before: int = 1, target: int = 1, error: str = "") -> pb.ScalingDecision:
    return pb.ScalingDecision(
        group=group, target_before=before, target=target, error=error, busy=math.nan, min_replicas=0, max_replicas=9
    )


def test_the_last_decision_and_the_last_changes_are_kept() -> None:
    decisions = Decisions()
    for number in range(100):
        decisions.report(decision(before=number, target=number + number % 2), now=number)
    decisions.report(decision("a"), now=100)
    a, g = decisions.reply(now=103).groups
    assert (a.last.group, a.since_success_s, a.stalled, len(a.changes)) == ("a", 3, False, 0)
    assert g.last.target == 100 and math.isnan(g.last.busy) and g.since_success_s == 4
    assert [one.target_before for one in g.changes] == [*range(37, 100, 2)] and len(g.changes) == MAX_CHANGES


def test_an_autoscaler_that_is_silent_or_fails_is_stalled() -> None:
    decisions = Decisions(stalled_after_s=15)
    assert decisions.stalled(0) == []
    decisions.report(decision("silent"), now=0)
    for now in range(30):
        decisions.report(decision("well"), now)
        decisions.report(decision("failing", error="" if now < 5 else "ZeroDivisionError: division by zero"), now)
        decisions.report(decision("never", error="ImportError: no policy"), now)
    assert decisions.stalled(15) == [] and decisions.stalled(15.1) == ["never", "silent"]
    found = {one.last.group: one for one in decisions.reply(30).groups}
    assert [name for name, one in found.items() if one.stalled] == ["failing", "never", "silent"]
    assert found["never"].since_success_s == -1 and found["failing"].since_success_s == 26
    assert found["failing"].last.error == "ZeroDivisionError: division by zero"
    decisions.report(decision("failing"), 31)
    assert decisions.stalled(31) == ["never", "silent"]


def test_an_autoscaler_that_was_never_heard_of_is_stalled() -> None:
    """As after a restart of the directory, where the autoscaler has died before."""
    decisions = Decisions(stalled_after_s=15)
    decisions.report(decision("well"), now=0)
    for now in range(0, 20):
        decisions.report(decision("well"), now)
        decisions.expect({"well", "unheard", "leaves"} if now < 10 else {"well", "unheard"}, now)
        assert decisions.stalled(now) == ([] if now <= 15 else ["unheard"])
    well, unheard = sorted(decisions.reply(20).groups, key=lambda one: one.stalled)
    assert (well.last.group, unheard.last.group, unheard.stalled) == ("well", "unheard", True)
    assert unheard.last.error == "no decision was ever heard of" and unheard.since_success_s == -1
    decisions.report(decision("unheard"), now=21)
    decisions.expect({"well", "unheard"}, 21)
    assert decisions.stalled(21) == []


def test_groups_that_have_gone_are_forgotten() -> None:
    decisions = Decisions()
    for group in "abc":
        decisions.report(decision(group), now=0)
    decisions.forget("a")
    decisions.expire({"b"}, now=FORGOTTEN_AFTER_S)
    assert [one.last.group for one in decisions.reply(0).groups] == ["b", "c"]
    decisions.expire({"b"}, now=FORGOTTEN_AFTER_S + 1)
    assert [one.last.group for one in decisions.reply(0).groups] == ["b"]


def test_what_is_reported_is_bounded() -> None:
    decisions = Decisions()
    decisions.report(pb.ScalingDecision(group="g", reason="r" * 10_000), now=0)
    assert len(decisions.reply(0).groups[0].last.reason) == 500
    for group in ("", "g" * 501):
        with pytest.raises(WireError, match="group"):
            decisions.report(decision(group), now=0)


def test_fields_that_are_not_known_are_not_kept() -> None:
    known = pb.ScalingDecision(group="g", target=1, reason="idle").SerializeToString()
    decisions = Decisions()
    decisions.report(pb.ScalingDecision.FromString(known + b"\x9a\x06\x03abc"), 0)
    assert decisions.reply(0).groups[0].last.SerializeToString() == known
