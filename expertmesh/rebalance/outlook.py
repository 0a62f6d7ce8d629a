"""What a change takes while it is under way: a pure function of its steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import GroupSection, Section
from expertmesh.coverage import GIB
from expertmesh.rebalance.change import Change
from expertmesh.rebalance.steps import Step


class Taken(Section):
    """By the replicas of all groups together."""

    replicas: int
    memory_gib: float
    """Expert weights, GiB."""
    num_cpus: float
    num_gpus: float


class Outlook(Section):
    kept: tuple[str, ...]
    resized: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    renamed: dict[str, str]
    """Name in the plan -> name in the cluster."""
    steps: tuple[str, ...]
    now: Taken
    peak: Taken
    """The most of each while the change is under way."""
    after: Taken
    predicted_balancedness: float | None = None
    """Mean over layers of mean / maximum load per replica, as the plan says."""


def look_ahead(
    change: Change, steps: Sequence[Step], manifest: Manifest, running: Mapping[str, int], balancedness: float | None
) -> Outlook:
    """`running` is how many replicas each group has now; groups to come count with their fewest."""
    now = taken(change.before, manifest, running)
    during = [taken(step.groups, manifest, running) for step in steps] or [now]
    peak = {key: max(getattr(one, key) for one in [now, *during]) for key in Taken.model_fields}
    return Outlook(
        kept=change.kept,
        resized=change.resized,
        added=change.added,
        removed=change.removed,
        renamed=dict(change.renamed),
        steps=tuple(step.text for step in steps),
        now=now,
        peak=Taken.model_validate(peak),
        after=during[-1],
        predicted_balancedness=balancedness,
    )


def taken(groups: Iterable[GroupSection], manifest: Manifest, running: Mapping[str, int]) -> Taken:
    counts = [(group, max(group.min_replicas, running.get(group.name, 0))) for group in groups]
    experts = {group.name: sum(map(len, group.expert_sets(manifest).values())) for group, _ in counts}
    return Taken(
        replicas=sum(count for _, count in counts),
        memory_gib=sum(count * experts[group.name] for group, count in counts) * manifest.expert_bytes / GIB,
        num_cpus=sum(count * group.num_cpus for group, count in counts),
        num_gpus=sum(count * group.num_gpus for group, count in counts),
    )
