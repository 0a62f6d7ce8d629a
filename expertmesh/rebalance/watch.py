"""The controller: looks at the observed loads again and again, and applies a new plan where that is worth it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import ClusterConfig, Section
from expertmesh.errors import ExpertMeshError
from expertmesh.placement.plan import Plan
from expertmesh.rebalance.decision import Attempt, Limits, Look, decide
from expertmesh.v1 import directory_pb2

MAX_ATTEMPTS = 16


@dataclass(frozen=True)
class Planned:
    """A plan and the groups that run, both under the same loads."""

    plan: Plan
    cost_now: float
    cost_planned: float
    """What the planner minimizes."""
    balancedness_now: float
    balancedness_planned: float


class Planner(Protocol):
    def __call__(self, loads: directory_pb2.ExpertLoadReply, config: ClusterConfig, manifest: Manifest) -> Planned:
        """A plan for these loads; raises ConfigError where there is none."""


class Subject(Protocol):
    """What the controller watches; one object per look, so that each sees the cluster as it is."""

    def loads(self, window_s: float) -> directory_pb2.ExpertLoadReply:
        """Raises ClusterError where the directory does not answer."""

    def planned(self, loads: directory_pb2.ExpertLoadReply) -> Planned: ...

    def groups_changed(self, plan: Plan) -> int:
        """Groups that would come or go."""

    def last(self) -> Attempt | None:
        """The last rebalance that is over, whoever began it."""

    def apply(self, plan: Plan) -> bool:
        """Whether it was done; False: rolled back. Raises ClusterError where another is under way or this one could
        not be finished."""


class Report(Section):
    """One look, for people and programs."""

    at: float
    """Unix time, seconds."""
    action: str
    """wait, would apply, applied, rolled back or failed."""
    reason: str
    window_s: float = 0
    """What the loads cover."""
    rows: int = 0
    gain: float | None = None
    """Share of the cost that the plan saves."""
    balancedness_now: float | None = None
    balancedness_planned: float | None = None
    groups_changed: int = 0

    @property
    def text(self) -> str:
        if self.balancedness_now is None or self.balancedness_planned is None:
            return f"{self.action}: {self.reason}"
        figures = f"balancedness {self.balancedness_now:.3f} now, {self.balancedness_planned:.3f} planned"
        return f"{self.action}: {self.reason}; {figures}, {self.rows:,} rows in {self.window_s:.0f} s"


@dataclass
class Controller:
    """`observe` never applies anything. It is asked for its subject anew at each look."""

    limits: Limits
    window_s: float
    observe: bool
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self._attempts: list[Attempt] = []

    def reports(
        self, subject: Callable[[], Subject], interval_s: float, sleep: Callable[[float], object] = time.sleep
    ) -> Iterator[Report]:
        """One after each look, for ever."""
        while True:
            yield self.look(subject)
            sleep(interval_s)

    def look(self, subject: Callable[[], Subject]) -> Report:
        """Looks, decides, and applies where that is due; whatever fails is in the report."""
        try:
            return self._look(subject())
        except ExpertMeshError as error:
            return Report(at=self.clock(), action="failed", reason=str(error))

    def _look(self, subject: Subject) -> Report:
        loads = subject.loads(self.window_s)
        rows = sum(sum(layer.rows) for layer in loads.layers)
        if not rows:
            return Report(at=self.clock(), action="wait", reason="no rows in the window", window_s=loads.window_s)
        planned = subject.planned(loads)
        changed = subject.groups_changed(planned.plan)
        now = self.clock()
        look = Look(now, rows, planned.cost_now, planned.cost_planned, changed)
        verdict = decide(look, self.limits, self._known(subject.last()))
        action, reason = "wait", verdict.reason
        if verdict.act:
            action, reason = ("would apply", reason) if self.observe else self._apply(subject, planned.plan, reason)
        return Report(
            at=now,
            action=action,
            reason=reason,
            window_s=loads.window_s,
            rows=rows,
            gain=look.gain if math.isfinite(look.gain) else None,
            balancedness_now=planned.balancedness_now,
            balancedness_planned=planned.balancedness_planned,
            groups_changed=changed,
        )

    def _apply(self, subject: Subject, plan: Plan, reason: str) -> tuple[str, str]:
        try:
            done = subject.apply(plan)
        except ExpertMeshError as error:
            self._attempts.append(Attempt(self.clock(), succeeded=False))
            return "failed", str(error)
        self._attempts.append(Attempt(self.clock(), succeeded=done))
        return "applied" if done else "rolled back", reason

    def _known(self, last: Attempt | None) -> list[Attempt]:
        """Our own attempts, and one that others made since."""
        self._attempts = self._attempts[-MAX_ATTEMPTS:]
        if last is not None and (not self._attempts or last.ended_at > self._attempts[-1].ended_at):
            self._attempts.append(last)
        return self._attempts
