"""The baseline of `hot_experts`: all experts scale together, as where they live in one fixed group.

Each group decides by the same policy and targets as ever; then all get as many replicas as the group that needs most.
Ray pickles this module by value, so what the groups share is in `uniform_board`.
"""

from __future__ import annotations

from typing import Any

from benchmarks import uniform_board
from expertmesh.scaling.serve_policy import GroupPolicy


class UniformPolicy:
    """A `policy_function` with the arguments of GroupPolicy. Tells no directory, since it does not do what a
    group decides."""

    def __init__(self, group: str, directory: str | None = None) -> None:
        self._group = group
        self._own = GroupPolicy(group)

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        uniform_board.wanted[self._group], state = self._own(ctx)
        return max(uniform_board.wanted.values()), state
