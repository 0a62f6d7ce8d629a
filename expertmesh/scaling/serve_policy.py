"""The policy as Ray Serve calls it in its controller, for each group ten times a second. Written against Ray 2.60.

Ray pickles this module by value into the controller: what it imports is taken from the installation there.
"""

from __future__ import annotations

import time
from typing import Any

from expertmesh.config import ScalingSection
from expertmesh.scaling.decision_log import DecisionLog
from expertmesh.scaling.policy import Bounds, Decision, GroupLoad, Memory, decide
from expertmesh.scaling.samples import Samples, reported_targets
from expertmesh.wire.tls import TlsFiles


class GroupPolicy:
    """`policy_function` of a group's AutoscalingConfig, whose delays are 0 and whose factors are 1, so that Serve does
    what this says. Serve makes a new one after each change of the config; replicas stay as they are meanwhile. The
    targets come with what the replicas report; until one has reported, there is no load to decide on either."""

    def __init__(self, group: str, directory: str | None = None, tls: dict[str, Any] | None = None) -> None:
        """`directory` is its host:port; None reports to nobody. `tls`: TlsFiles by which it is asked."""
        self._targets = ScalingSection()
        self._samples = Samples()
        self._memory = Memory()
        self._log = DecisionLog(group, directory, TlsFiles.model_validate(tls) if tls else None)

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """ctx: Ray's AutoscalingContext. Replicas that the group should have, and no state for Serve to keep."""
        target: int = ctx.target_num_replicas
        try:
            target = self.decide(ctx).replicas
        except Exception as error:  # noqa: BLE001 what escaped would stop Serve's autoscaler for all groups
            self._log.failed(f"{type(error).__name__}: {error}")
        return target, {}

    def decide(self, ctx: Any) -> Decision:
        now, metrics = time.monotonic(), ctx.raw_metrics or {}
        self._targets = reported_targets(ctx.running_replicas, metrics) or self._targets
        load = GroupLoad(
            now=now,
            running=ctx.current_num_replicas,
            target=ctx.target_num_replicas,
            replicas=self._samples.loads(ctx.running_replicas, metrics, now),
            wanted=ctx.total_num_requests > 0,
        )
        bounds = Bounds(ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas)
        decision, self._memory = decide(load, self._targets, bounds, self._memory)
        self._log.decided(load, bounds, decision)
        return decision
