"""From a model, its loads and today's groups to a plan with everything that is shown beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import GroupSection
from expertmesh.coverage import GIB, check_memory
from expertmesh.errors import ConfigError
from expertmesh.placement.comparison import Figures, PlannedGroup, eplb_figures, figures
from expertmesh.placement.division import Division, Held, evaluate
from expertmesh.placement.groups import heirs, held_by, sections
from expertmesh.placement.loads import Loads
from expertmesh.placement.plan import Plan, Prediction
from expertmesh.placement.planner import Aims, divide, needed_replicas

ANY_GROUP = GroupSection(name="any", experts="0")
"""Resources of groups where there are none today."""
MAX_REPLICAS = 1_000_000
"""Of a plan."""


@dataclass(frozen=True)
class Bounds:
    """`growth`: groups may have replicas for so many times the loads; `sleep`: cold ones may have none."""

    growth: float = 3.0
    sleep: bool = False


@dataclass(frozen=True)
class Proposal:
    plan: Plan
    groups: tuple[PlannedGroup, ...]
    planned: Figures
    eplb: Figures
    today: Figures | None
    today_groups: tuple[PlannedGroup, ...]
    remarks: tuple[str, ...]


def propose(
    manifest: Manifest, loads: Loads, aims: Aims, bounds: Bounds, today: Sequence[GroupSection] = ()
) -> Proposal:
    """Raises ConfigError where no plan is possible or reaches the target; see `divide`."""
    held = held_by(today, manifest) if today else None
    division = divide(manifest, loads, aims, held)
    most = _most(division, aims, bounds)
    if division.replicas.sum() > MAX_REPLICAS:
        raise ConfigError(
            f"plan: {division.replicas.sum():.4g} replicas would be needed, more than {MAX_REPLICAS:,}; are the loads "
            "and the rows per replica right?"
        )
    chosen = [ANY_GROUP] * len(most) if held is None else heirs(division, loads.array(manifest), today, held)
    templates = [one.model_copy(update={"memory_gib": aims.memory_gib, "min_replicas": 1}) for one in chosen]
    made = sections(division, manifest, templates, most, today)
    if bounds.sleep:
        made = tuple(
            one.model_copy(update={"min_replicas": 0}) if one.name.startswith("cold-") else one for one in made
        )
    planned = figures(division, manifest, aims)
    now = None if held is None else _today(manifest, loads, aims, today, held)
    predicted = Prediction(
        **planned.model_dump(include=Prediction.model_fields.keys() - {"group_replicas"}),
        group_replicas={one.name: int(count) for one, count in zip(made, division.replicas, strict=True)},
    )
    plan = Plan(fingerprint=manifest.fingerprint, groups=made, predicted=predicted)
    for one in made:
        check_memory(one, one.expert_sets(manifest), manifest)
    return Proposal(
        plan=plan,
        groups=_rows(division, made, manifest, aims),
        planned=planned,
        eplb=eplb_figures(loads.array(manifest), division, manifest, aims),
        today=None if now is None else figures(now, manifest, aims),
        today_groups=() if now is None else _rows(now, today, manifest, aims),
        remarks=() if now is None else tuple(_remarks(now, today, planned, manifest, aims)),
    )


def _today(manifest: Manifest, loads: Loads, aims: Aims, today: Sequence[GroupSection], held: Held) -> Division:
    known = numpy.nan_to_num(loads.array(manifest))
    least = numpy.array([float(group.min_replicas) for group in today])
    return evaluate(held, known, aims.capacity, least)


def _most(division: Division, aims: Aims, bounds: Bounds) -> list[int]:
    if bounds.growth < 1:
        raise ConfigError(f"plan: growth {bounds.growth:g} is less than 1: groups could not carry these loads")
    wanted = needed_replicas(division, aims.capacity, bounds.growth)
    limit = aims.max_replicas or wanted.max()
    return [int(min(one, limit)) for one in wanted]


def _rows(
    division: Division, groups: Sequence[GroupSection], manifest: Manifest, aims: Aims
) -> tuple[PlannedGroup, ...]:
    loads, total = division.group_loads, max(float(division.group_loads.sum()), 1e-300)
    return tuple(
        PlannedGroup(
            name=group.name,
            experts_per_layer=float(division.sizes[number]) / len(manifest.layers),
            load_share=float(loads[number]) / total,
            replicas=int(division.replicas[number]),
            busy=float(loads[number] / max(division.replicas[number], 1) / aims.rows_per_replica),
            memory_gib=float(division.sizes[number]) * manifest.expert_bytes / GIB,
            min_replicas=group.min_replicas,
            max_replicas=group.max_replicas,
        )
        for number, group in enumerate(groups)
    )


def _runs_on(group: GroupSection) -> dict[str, object]:
    return group.model_dump(exclude={"name", "experts", "min_replicas", "max_replicas"})


def _remarks(
    now: Division, today: Sequence[GroupSection], planned: Figures, manifest: Manifest, aims: Aims
) -> list[str]:
    found = [
        f"today: group {group.name}: scaling target not reachable: {aims.target_busy:.0%} busy needs {count:.0f} "
        f"replicas, max_replicas is {group.max_replicas}"
        for group, count in zip(today, now.replicas, strict=True)
        if count > group.max_replicas
    ]
    if any(_runs_on(group) != _runs_on(today[0]) for group in today):
        found.append(
            "today's groups differ in resources or targets; each of the plan's has those of the one that holds most of "
            "its load"
        )
    if figures(now, manifest, aims).memory_gib <= planned.memory_gib * (1 + 1e-9):
        found.append("today's groups need no more memory x time than this plan")
    return found
