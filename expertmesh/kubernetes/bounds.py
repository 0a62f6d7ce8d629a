"""Replica bounds of one group, as they stand in a Serve config's `deployments:` override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertmesh.errors import ConfigError

LEAST, MOST, INITIAL = "min_replicas", "max_replicas", "initial_replicas"
"""Keys of an autoscaling_config. Serve refuses an INITIAL outside of the others."""
AUTOSCALING, FIXED, USER_CONFIG = "autoscaling_config", "num_replicas", "user_config"
Override = Mapping[str, Any]
"""One entry of `deployments:`."""


@dataclass(frozen=True)
class Bounds:
    """Raises ConfigError where they contradict."""

    least: int
    most: int

    def __post_init__(self) -> None:
        if self.least < 0 or self.most < 1:
            raise ConfigError(f"bounds {self}: MIN is at least 0, MAX at least 1")
        if self.least > self.most:
            raise ConfigError(f"bounds {self}: MIN is above MAX")

    def __str__(self) -> str:
        return f"{self.least} to {self.most}"


def read_bounds(override: Override) -> Bounds:
    """Serve's defaults stand for what is not written; raises ConfigError where the bounds are no numbers."""
    scaling, fixed = override.get(AUTOSCALING), override.get(FIXED)
    if isinstance(scaling, Mapping):
        least, most = scaling.get(LEAST, 1), scaling.get(MOST, 1)
    else:
        least = most = 1 if fixed is None else fixed
    for value in (least, most):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"deployment {override.get('name')}: {value!r} is no number of replicas")
    return Bounds(least, most)


def with_bounds(override: Override, bounds: Bounds) -> dict[str, Any]:
    """The override with other bounds and all else as it is, keys in their order.

    An `autoscaling_config` that holds more than bounds, such as a policy, stays one where both bounds are equal.
    """
    scaling = override.get(AUTOSCALING) or {}
    more = scaling.keys() - {LEAST, MOST, INITIAL}
    if bounds.least == bounds.most and not more:
        return _swap(override, FIXED, bounds.least)
    changed = dict(scaling) | {LEAST: bounds.least, MOST: bounds.most}
    if changed.get(INITIAL) is not None:
        changed[INITIAL] = min(max(changed[INITIAL], bounds.least), bounds.most)
    return _swap(override, AUTOSCALING, changed)


def _swap(override: Override, key: str, value: Any) -> dict[str, Any]:
    """`key` stands where bounds stood before, or last."""
    changed: dict[str, Any] = {}
    for old, content in override.items():
        changed |= {key: value} if old in (AUTOSCALING, FIXED) else {old: content}
    return changed | {key: value}
