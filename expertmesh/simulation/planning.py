"""The planner inside a simulation: groups made by `expertmesh.placement.planner.divide` from the loads so far."""

from __future__ import annotations

import numpy

from expertmesh.artifact.manifest import ExpertFunction, Manifest
from expertmesh.placement.arrays import Floats
from expertmesh.placement.capacity import modelled_capacity
from expertmesh.placement.loads import Loads
from expertmesh.placement.planner import Aims, divide
from expertmesh.scaling.policy import Bounds
from expertmesh.simulation.layout import Group
from expertmesh.simulation.scenario import PlannerSection, Scenario


def planned_groups(scenario: Scenario, section: PlannerSection, rows_per_s: Floats, number: int) -> tuple[Group, ...]:
    """rows_per_s [L * E] -> groups whose names begin with the plan's number.

    The planner is not told of `max_replicas`: a load beyond it would end the run; the policy keeps to it. Raises
    ConfigError where memory is too small.
    """
    shape, manifest = scenario.model, manifest_of(scenario)
    per_layer = rows_per_s.reshape(shape.layers, shape.experts)
    loads = Loads(rows_per_s={layer: tuple(row) for layer, row in zip(shape.numbers, per_layer.tolist(), strict=True)})
    capacity = modelled_capacity(scenario.device, manifest, scenario.traffic.tokens_per_step)
    aims = Aims(
        capacity.rows_per_s,
        scenario.scaling.target_busy,
        section.groups,
        section.memory_gib,
    )
    held = divide(manifest, loads, aims).held
    bounds = Bounds(section.min_replicas, section.max_replicas)
    groups = []
    for place in range(held.shape[1]):
        experts = {
            layer: frozenset(numpy.flatnonzero(row).tolist())
            for layer, row in zip(shape.numbers, held[:, place], strict=True)
        }
        groups.append(Group(f"p{number}-{place}", experts, bounds, section.num_gpus, scenario.device, scenario.scaling))
    return tuple(groups)


def manifest_of(scenario: Scenario) -> Manifest:
    """Of the scenario's model, as far as the planner reads it; no artifact has its fingerprint."""
    shape = scenario.model
    return Manifest(
        name=scenario.name,
        architecture="",
        model_type="",
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        layers=dict.fromkeys(shape.numbers, shape.experts),
        top_k=shape.top_k,
        dtype="bfloat16",
        expert_function=ExpertFunction(activation="silu", gated=shape.gated),
        fingerprint="simulated",
        expert_bytes=round(shape.cost.weight_bytes),
    )
