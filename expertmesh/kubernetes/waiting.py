"""Waits until a RayService has reached a goal, through whatever happens to the connection."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from expertmesh.errors import ClusterError
from expertmesh.kubernetes.goal import Goal, judge
from expertmesh.kubernetes.ray_services import RayServices
from expertmesh.kubernetes.service import Service

Show = Callable[[str], None]
"""Is told what is awaited, in one line."""


@dataclass(frozen=True)
class Patience:
    """Seconds."""

    timeout_s: float = 600
    settle_s: float = 6
    """For so long a status must stay: KubeRay 1.7 asks Ray Serve every 2 s, and last before it applies a config."""
    silence_s: float = 60
    """The API server may be silent for so long."""


class NotReached(ClusterError):
    """The RayService failed, or took too long."""


def await_goal(
    services: RayServices,
    name: str,
    goal: Goal,
    patience: Patience,
    show: Show,
    overtaken: Callable[[Service], str] = lambda _: "",
) -> Service:
    """Raises NotReached where it fails or takes too long, and ClusterError where `overtaken` says in a line that others
    have changed what is awaited."""
    deadline = time.monotonic() + patience.timeout_s
    since, state = time.monotonic(), "awaited"
    every_s = min(max(1.0, patience.settle_s), 10.0)
    for found in services.follow(name, every_s, patience.silence_s):
        if problem := overtaken(found):
            raise ClusterError(problem)
        now, verdict = time.monotonic(), judge(found, goal)
        if verdict.state != state:
            since, state = now, verdict.state
        if state != "awaited" and now - since >= patience.settle_s:
            if state == "failed":
                raise NotReached(verdict.detail)
            return found
        if now > deadline:
            raise NotReached(f"not reached within {patience.timeout_s:.0f} s: {verdict.detail or 'did not settle'}")
        show(verdict.detail or "as wanted; making sure that it stays so")
    raise AssertionError("a RayService is followed for ever")
