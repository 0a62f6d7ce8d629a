"""The policy of `hot_experts`, which a file switches: with another policy function Ray Serve would start all replicas
anew.

Ray pickles this module by value, so what the groups share is in `scaling_switch`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import scaling_switch
from expertmesh.scaling.serve_policy import GroupPolicy


class SwitchedPolicy:
    """A `policy_function`. `per_group` is GroupPolicy. In `uniform` each group decides by the same policy and targets;
    then all get as many replicas as the group that needs most, as where all experts live in one fixed group. That tells
    no directory, since it does not do what a group decides."""

    def __init__(self, group: str, switch: str, directory: str | None = None) -> None:
        self._group, self._path, self._directory = group, Path(switch), directory
        self._switch: scaling_switch.Switch | None = None

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        switch = scaling_switch.Switch.read(self._path)
        if switch != self._switch:
            self._switch = switch
            self._own = GroupPolicy(self._group, self._directory if switch.scaling == "per_group" else None)
        if switch.scaling == "held":
            return switch.replicas[self._group], {}
        target, state = self._own(ctx)
        if switch.scaling == "per_group":
            return target, state
        scaling_switch.wanted[self._group] = target
        return max(scaling_switch.wanted.values()), state
