"""What the autoscaler decided for each group, and whether it is still at work.

Times are seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from expertmesh.errors import WireError
from expertmesh.v1 import directory_pb2 as pb

STALLED_AFTER_S = 15.0
FORGOTTEN_AFTER_S = 600.0
MAX_CHANGES = 32
MAX_GROUPS = 10_000
MAX_TEXT = 500


@dataclass
class History:
    """Of one group."""

    first_at: float
    last_at: float
    last: pb.ScalingDecision
    success_at: float | None = None
    changes: deque[pb.ScalingDecision] = field(default_factory=lambda: deque(maxlen=MAX_CHANGES))


class Decisions:
    """The autoscaler of a group is stalled where none of its decisions has succeeded for `stalled_after_s`, or where
    nothing has been heard of one that is expected for so long."""

    def __init__(self, stalled_after_s: float = STALLED_AFTER_S) -> None:
        self._stalled_after_s = stalled_after_s
        self._groups: dict[str, History] = {}
        self._expected: dict[str, float] = {}
        """Groups that nothing has been heard of, and since when they have been expected."""

    def report(self, decision: pb.ScalingDecision, now: float) -> None:
        """Raises WireError where it names no group, or one too many."""
        if not 0 < len(decision.group) <= MAX_TEXT:
            raise WireError("decision: group is empty or too long")
        decision = _copy(decision)
        history = self._groups.get(decision.group)
        self._expected.pop(decision.group, None)
        if history is None:
            if len(self._groups) >= MAX_GROUPS:
                raise WireError(f"decision for {decision.group}: {MAX_GROUPS} groups scale already")
            history = self._groups[decision.group] = History(now, now, decision)
        history.last, history.last_at = decision, now
        if decision.error:
            return
        history.success_at = now
        if decision.target != decision.target_before:
            history.changes.append(decision)

    def expect(self, live: Collection[str], now: float) -> None:
        """These groups have replicas, so that somebody should decide for them."""
        self._expected = {one: self._expected.get(one, now) for one in live if one not in self._groups}

    def forget(self, group: str) -> None:
        """The group has been removed."""
        self._groups.pop(group, None)
        self._expected.pop(group, None)

    def expire(self, live: Collection[str], now: float) -> None:
        """Forgets groups of which nothing was heard for long and that have no live replica."""
        for group in [one for one in self._groups if one not in live]:
            if now - self._groups[group].last_at > FORGOTTEN_AFTER_S:
                self.forget(group)

    def stalled(self, now: float) -> list[str]:
        known = [group for group, history in self._groups.items() if self._stalled(history, now)]
        return sorted([*known, *self._unheard(now)])

    def reply(self, now: float) -> pb.ScalingReply:
        return pb.ScalingReply(
            groups=[
                pb.GroupScaling(
                    last=history.last,
                    changes=history.changes,
                    since_success_s=-1.0 if history.success_at is None else max(0.0, now - history.success_at),
                    stalled=self._stalled(history, now),
                )
                for _, history in sorted(self._groups.items())
            ]
            + [
                pb.GroupScaling(
                    last=pb.ScalingDecision(group=group, error="no decision was ever heard of"),
                    since_success_s=-1.0,
                    stalled=True,
                )
                for group in self._unheard(now)
            ]
        )

    def _unheard(self, now: float) -> list[str]:
        return sorted(group for group, since in self._expected.items() if now - since > self._stalled_after_s)

    def _stalled(self, history: History, now: float) -> bool:
        since = history.first_at if history.success_at is None else history.success_at
        return now - since > self._stalled_after_s


def _copy(decision: pb.ScalingDecision) -> pb.ScalingDecision:
    """With its texts cut, and nothing of what was received behind it: what a message once held stays in its memory."""
    decision.DiscardUnknownFields()
    decision.reason, decision.error = decision.reason[:MAX_TEXT], decision.error[:MAX_TEXT]
    copy = pb.ScalingDecision()
    copy.CopyFrom(decision)
    return copy
