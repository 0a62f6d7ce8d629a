"""What two divisions of experts into groups have in common, and what must come and go: pure functions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import GroupSection
from expertmesh.errors import ConfigError
from expertmesh.experts import LayerExperts, format_indices

IN_PLACE = frozenset({"min_replicas", "max_replicas", "scaling", "memory_gib"})
"""Of a group, what changes without a restart of its replicas."""
NAME_LENGTH, DIGEST_LENGTH = 40, 6

Groups = tuple[GroupSection, ...]


@dataclass(frozen=True)
class Change:
    """`after` bears the names under which the groups will run; each of `added` is new to the cluster."""

    before: Groups
    after: Groups
    kept: tuple[str, ...]
    """Run on as they are."""
    resized: tuple[str, ...]
    """Run on with other bounds or scaling targets."""
    added: tuple[str, ...]
    removed: tuple[str, ...]
    renamed: Mapping[str, str]
    """Name in the plan -> name in the cluster, where they differ."""

    @property
    def nothing(self) -> bool:
        return not (self.added or self.removed or self.resized)


def content(group: GroupSection, manifest: Manifest) -> str:
    """Digest of all that a replica of the group is made of: its experts and resources, not its name or bounds."""
    held = {layer: format_indices(experts) for layer, experts in sorted(group.expert_sets(manifest).items()) if experts}
    rest = group.model_dump(mode="json", exclude={"name", "experts", *IN_PLACE})
    return hashlib.sha256(json.dumps([held, rest], sort_keys=True).encode()).hexdigest()


def difference(before: Sequence[GroupSection], wanted: Sequence[GroupSection], manifest: Manifest) -> Change:
    """How to get from the groups that run to those of a plan.

    A group of the plan whose content runs already, under whatever name, is that group, and stays as it was written:
    Serve restarts what is written otherwise. One whose name belongs to a
    group of other content gets a digest behind its name, since a changed group would restart in place.
    """
    now = {group.name: group for group in before}
    digests = {name: content(group, manifest) for name, group in now.items()}
    names = _names(digests, wanted, manifest)
    after = tuple(
        now[names[group.name]].model_copy(update={field: getattr(group, field) for field in IN_PLACE})
        if names[group.name] in now
        else group.model_copy(update={"name": names[group.name]})
        for group in wanted
    )
    return between(before, after, {old: new for old, new in names.items() if old != new})


def between(
    before: Sequence[GroupSection], after: Sequence[GroupSection], renamed: Mapping[str, str] | None = None
) -> Change:
    """The change where groups of the same name have the same content."""
    old, new = {group.name: group for group in before}, {group.name: group for group in after}
    both = [name for name in old if name in new]
    return Change(
        before=tuple(before),
        after=tuple(after),
        kept=tuple(name for name in both if _in_place(old[name]) == _in_place(new[name])),
        resized=tuple(name for name in both if _in_place(old[name]) != _in_place(new[name])),
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        renamed=renamed or {},
    )


def awake(groups: Iterable[GroupSection], replicas: Mapping[str, int]) -> Groups:
    """The groups with as many replicas at least as `replicas` says, within their bounds, and one at least: what sleeps
    cannot be verified, and what starts small is overrun."""
    return tuple(
        group.model_copy(update={"min_replicas": max(1, group.min_replicas, wanted)})
        for group in groups
        for wanted in [min(replicas.get(group.name, 0), group.max_replicas)]
    )


def held_experts(groups: Iterable[GroupSection], manifest: Manifest) -> dict[str, LayerExperts]:
    """Group -> its experts per MoE layer."""
    return {group.name: group.expert_sets(manifest) for group in groups}


def _in_place(group: GroupSection) -> dict[str, object]:
    return group.model_dump(include=set(IN_PLACE))


def _names(running: Mapping[str, str], wanted: Sequence[GroupSection], manifest: Manifest) -> dict[str, str]:
    """Name in the plan -> name in the cluster; groups that keep their name come first."""
    digests = {group.name: content(group, manifest) for group in wanted}
    names = {name: name for name, digest in digests.items() if running.get(name) == digest}
    free = {name: digest for name, digest in running.items() if name not in names}
    for name, digest in digests.items():
        if name in names:
            continue
        same = next((one for one in sorted(free) if free[one] == digest), None)
        if same is not None:
            names[name] = same
            del free[same]
    taken = set(running) | set(names.values())
    for name, digest in digests.items():
        if name not in names:
            names[name] = name if name not in taken else _with_digest(name, digest, taken)
            taken.add(names[name])
    return names


def _with_digest(name: str, digest: str, taken: set[str]) -> str:
    stem = name[: NAME_LENGTH - DIGEST_LENGTH - 1].rstrip("-")
    made = f"{stem}-{digest[:DIGEST_LENGTH]}"
    if made in taken:
        raise ConfigError(f"plan: group {name}: another group {made} runs already; give it another name")
    return made
