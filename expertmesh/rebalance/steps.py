"""The steps of a change, each named by the groups that are deployed once it is done: pure functions.

Steps are declarative, so that one that was interrupted is simply done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from expertmesh.config import GroupSection, Section
from expertmesh.errors import ConfigError
from expertmesh.experts import LayerExperts
from expertmesh.rebalance.change import Change, Groups, awake

Kind = Literal["start", "verify", "use", "remove", "settle"]
Fits = Callable[[Sequence[GroupSection]], str]
"""Why these groups do not fit the cluster together; empty where they do."""


class Step(Section):
    kind: Kind
    names: tuple[str, ...]
    """Groups that it is about."""
    groups: Groups
    """All that are deployed once it is done."""

    @property
    def text(self) -> str:
        return f"{self.kind} {', '.join(self.names)}"


@dataclass(frozen=True)
class Stage:
    """Groups that come, and those that go once these are in use."""

    add: tuple[str, ...]
    remove: tuple[str, ...]


def make_steps(
    change: Change,
    held: Mapping[str, LayerExperts],
    fits: Fits,
    replicas: Mapping[str, int] | None = None,
    *,
    in_steps: bool = False,
) -> tuple[Step, ...]:
    """New groups start one after another, so that loading takes little from those that serve; old ones go once all of
    their experts are served by others that are verified and in use. `held` has the experts of every group before and
    after, `replicas` how many new groups should have until all is settled. Raises ConfigError where the cluster has no
    room for any order.
    """
    old = {group.name: group for group in change.before}
    new = {group.name: group for group in awake(change.after, replicas or {})}
    deployed, steps = dict(old), []

    def now() -> Groups:
        return tuple(deployed.values())

    for stage in make_stages(change, new, held, fits, in_steps=in_steps):
        for name in stage.add:
            deployed[name] = new[name]
            steps += [Step(kind="start", names=(name,), groups=now()), Step(kind="verify", names=(name,), groups=now())]
        if stage.add:
            steps.append(Step(kind="use", names=stage.add, groups=now()))
        if stage.remove:
            for name in stage.remove:
                del deployed[name]
            steps.append(Step(kind="remove", names=stage.remove, groups=now()))
    raised = [group.name for group in change.after if group.name in change.added and group != new[group.name]]
    if change.resized or raised:
        steps.append(Step(kind="settle", names=(*change.resized, *raised), groups=change.after))
    return tuple(steps)


def make_stages(
    change: Change,
    new: Mapping[str, GroupSection],
    held: Mapping[str, LayerExperts],
    fits: Fits,
    *,
    in_steps: bool = False,
) -> tuple[Stage, ...]:
    """One stage where old and new have room side by side, otherwise as few groups at a time as it takes to let an old
    one go."""
    short = fits([*change.before, *(new[name] for name in change.added)])
    if not short and not in_steps:
        return (Stage(change.added, change.removed),) if change.added or change.removed else ()
    deployed = {group.name: group for group in change.before}
    waiting, leaving = list(change.added), list(change.removed)
    stages = []
    while waiting or leaving:
        stage = _next_stage(deployed, new, waiting, leaving, held, fits)
        if stage is None:
            raise ConfigError(f"plan: no order of its groups fits beside those that run: {short or 'no room'}")
        stages.append(stage)
        for name in stage.add:
            deployed[name] = new[name]
            waiting.remove(name)
        for name in stage.remove:
            del deployed[name]
            leaving.remove(name)
    return tuple(stages)


def removable(candidates: Iterable[str], deployed: Iterable[str], held: Mapping[str, LayerExperts]) -> tuple[str, ...]:
    """Those of the candidates that can all go, because the others of `deployed` hold every expert that they hold."""
    left, gone = list(deployed), []
    for name in candidates:
        rest = [one for one in left if one != name]
        if _covers(rest, held[name], held):
            left = rest
            gone.append(name)
    return tuple(gone)


def _next_stage(
    deployed: Mapping[str, GroupSection],
    new: Mapping[str, GroupSection],
    waiting: Sequence[str],
    leaving: Sequence[str],
    held: Mapping[str, LayerExperts],
    fits: Fits,
) -> Stage | None:
    """The fewest new groups that fit and let an old group go; what can go without any goes first."""
    ready = removable(leaving, deployed, held)
    if ready:
        return Stage((), ready)
    needed = [_needed(old, deployed, waiting, held) for old in leaving] if leaving else [tuple(waiting)]
    for add in sorted(needed, key=len):
        if not add or fits([*deployed.values(), *(new[name] for name in add)]):
            continue
        together = [*deployed, *add]
        return Stage(add, removable(leaving, together, held))
    return None


def _needed(
    old: str, deployed: Iterable[str], waiting: Sequence[str], held: Mapping[str, LayerExperts]
) -> tuple[str, ...]:
    """New groups, those that take most of it first, without which `old` could not go; empty where they do not do."""
    others = [name for name in deployed if name != old]
    missing = {(layer, one) for layer, experts in held[old].items() for one in experts} - _pairs(others, held)
    chosen: list[str] = []
    while missing:
        gains = {name: len(missing & _pairs([name], held)) for name in waiting if name not in chosen}
        best = max(gains, key=lambda name: gains[name], default=None)
        if best is None or not gains[best]:
            return ()
        chosen.append(best)
        missing -= _pairs([best], held)
    return tuple(chosen)


def _covers(names: Iterable[str], wanted: LayerExperts, held: Mapping[str, LayerExperts]) -> bool:
    return {(layer, one) for layer, experts in wanted.items() for one in experts} <= _pairs(names, held)


def _pairs(names: Iterable[str], held: Mapping[str, LayerExperts]) -> set[tuple[int, int]]:
    return {(layer, one) for name in names for layer, experts in held[name].items() for one in experts}
