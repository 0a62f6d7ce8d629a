"""Which group holds which (layer, expert), as arrays. Shape letters: G groups, P held (group, layer, expert)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from expertmesh.config import EmulatedDevice, ScalingSection
from expertmesh.errors import ConfigError
from expertmesh.experts import LayerExperts, format_indices, resolve_experts
from expertmesh.placement.plan import read_plan_file
from expertmesh.scaling.policy import Bounds
from expertmesh.simulation.scenario import MAX_GROUPS, DivisionSection, Scenario

Floats = NDArray[numpy.float64]
Indices = NDArray[numpy.int64]


@dataclass(frozen=True)
class Group:
    name: str
    held: LayerExperts
    bounds: Bounds
    num_gpus: float
    device: EmulatedDevice
    scaling: ScalingSection


@dataclass(frozen=True)
class Layout:
    groups: tuple[Group, ...]
    pairs: Indices
    """[P] layer * experts + expert, group by group; layers count from 0 without gaps."""
    starts: Indices
    """[G] where each group's pairs begin."""
    group_of: Indices
    """[P]"""
    layers: Indices
    """[G] layers in which a group holds experts."""
    homes: Indices
    """[P] groups that hold this pair."""

    @property
    def sizes(self) -> Indices:
        """[G] (layer, expert) pairs held."""
        return numpy.diff(numpy.append(self.starts, len(self.pairs)))

    def per_group(self, values: Floats) -> Floats:
        """[P] -> [G], summed."""
        return numpy.add.reduceat(values, self.starts)


def make_layout(scenario: Scenario) -> Layout:
    """Raises ConfigError where a group names what the model has not, or an expert is in none."""
    groups = tuple(_divided(scenario, scenario.division) if scenario.division is not None else _listed(scenario))
    return layout_of(groups, scenario)


def layout_of(groups: Sequence[Group], scenario: Scenario) -> Layout:
    shape = scenario.model
    row = {number: place for place, number in enumerate(shape.numbers)}
    per_group = [
        [
            row[layer] * shape.experts + expert
            for layer, experts in sorted(group.held.items())
            for expert in sorted(experts)
        ]
        for group in groups
    ]
    for group, held in zip(groups, per_group, strict=True):
        if not held:
            raise ConfigError(f"group {group.name}: experts: holds none")
    pairs = numpy.concatenate([numpy.array(held, dtype=numpy.int64) for held in per_group])
    sizes = numpy.array([len(held) for held in per_group])
    counts = numpy.bincount(pairs, minlength=shape.layers * shape.experts)
    if not counts.all():
        layer, _expert = divmod(int(numpy.argmin(counts)), shape.experts)
        missing = numpy.flatnonzero(counts.reshape(shape.layers, -1)[layer] == 0).tolist()
        raise ConfigError(f"groups: layer {shape.first_layer + layer}: no group holds expert {format_indices(missing)}")
    return Layout(
        groups=tuple(groups),
        pairs=pairs,
        starts=numpy.concatenate([[0], numpy.cumsum(sizes)[:-1]]),
        group_of=numpy.repeat(numpy.arange(len(sizes)), sizes),
        layers=numpy.array([sum(bool(experts) for experts in group.held.values()) for group in groups]),
        homes=counts[pairs],
    )


def _divided(scenario: Scenario, division: DivisionSection) -> Sequence[Group]:
    shape, bounds = scenario.model, Bounds(division.min_replicas, division.max_replicas)
    count = -(-shape.layers // division.layers_per_group) * -(-shape.experts // division.experts_per_group)
    if count > MAX_GROUPS:
        raise ConfigError(f"division: makes {count} groups; at most {MAX_GROUPS} are possible")
    groups = []
    for low in range(0, shape.layers, division.layers_per_group):
        layers = shape.numbers[low : low + division.layers_per_group]
        for first in range(0, shape.experts, division.experts_per_group):
            experts = frozenset(range(first, min(first + division.experts_per_group, shape.experts)))
            name = f"l{layers[0]}-e{first}"
            held = dict.fromkeys(layers, experts)
            groups.append(Group(name, held, bounds, division.num_gpus, scenario.device, scenario.scaling))
    return groups


def _listed(scenario: Scenario) -> Sequence[Group]:
    sections = scenario.groups
    if sections is None:
        assert scenario.plan is not None
        sections = read_plan_file(scenario.plan).groups
    age_s = scenario.policy.metrics_age_s
    for section in sections:
        if section.scaling is not None and age_s > section.scaling.stale_after_s:
            raise ConfigError(
                f"policy.metrics_age_s: {age_s:g} s, but stale_after_s {section.scaling.stale_after_s:g} of group "
                f"{section.name} ignores those"
            )
    layers: Mapping[int, int] = dict.fromkeys(scenario.model.numbers, scenario.model.experts)
    return [
        Group(
            section.name,
            resolve_experts(section.experts, layers, f"group {section.name}: experts"),
            Bounds(section.min_replicas, section.max_replicas),
            section.num_gpus,
            section.emulated or scenario.device,
            section.scaling or scenario.scaling,
        )
        for section in sections
    ]
