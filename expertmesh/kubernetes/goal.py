"""When a change of a RayService has arrived: a pure function of what its operator reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expertmesh.kubernetes.service import READY, TERMINAL_REASONS, UPGRADING, Service

RUNNING, FAILED, UNHEALTHY = "RUNNING", "DEPLOY_FAILED", "UNHEALTHY"
MESSAGE_CHARS = 200
SHOWN = 4
State = Literal["reached", "failed", "awaited"]


@dataclass(frozen=True)
class Goal:
    generation: int
    """Of the spec that the operator must have seen."""
    running: frozenset[str] = frozenset()
    """Applications that must run."""
    gone: frozenset[str] = frozenset()
    """Applications that must not be there any more."""
    ready: bool = False
    """Also that the RayService takes requests."""


@dataclass(frozen=True)
class Verdict:
    state: State
    detail: str
    """One line: what is awaited, or what failed."""


def judge(service: Service, goal: Goal) -> Verdict:
    """Of what is reported now. The operator may have read it just before it applied a new spec, so that only a verdict
    which stays for some seconds counts."""
    ready = service.condition(READY)
    if ready and ready.status != "True" and ready.reason in TERMINAL_REASONS:
        return Verdict("failed", f"{ready.reason}: {_short(ready.message)}")
    if service.observed_generation < goal.generation:
        return Verdict(
            "awaited", f"the operator has seen generation {service.observed_generation}, not {goal.generation}"
        )
    failures: list[str] = []
    missing: list[str] = []
    for name in sorted(goal.running):
        found = service.application(name)
        if found is None or found.status != RUNNING:
            said = f"{name}: {found.status or 'no status'}{_message(found.message)}" if found else f"{name}: absent"
            (failures if found and found.status == FAILED else missing).append(said)
    if failures:
        return Verdict("failed", _listed(failures))
    missing += [f"{one.name}: {one.status}" for one in service.applications if one.name in goal.gone]
    upgrading = service.condition(UPGRADING)
    if upgrading and upgrading.status == "True":
        missing.append(f"an upgrade to {service.pending_cluster} is under way")
    if goal.ready and (ready is None or ready.status != "True"):
        missing.append(f"not ready{f': {ready.reason}' if ready else ''}")
    return Verdict("awaited", _listed(missing)) if missing else Verdict("reached", "")


def _message(text: str) -> str:
    return f", {_short(text)}" if text else ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MESSAGE_CHARS else f"{line[:MESSAGE_CHARS]}…"


def _listed(lines: list[str]) -> str:
    more = len(lines) - SHOWN
    return "; ".join(lines[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
