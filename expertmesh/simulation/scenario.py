"""What is simulated, as one validated object: model, device, groups, traffic, policy, cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pydantic

from expertmesh.config import EmulatedDevice, GroupSection, Name, ScalingSection, Section
from expertmesh.scaling.emulation import ExpertCost
from expertmesh.yaml_file import read_model

StrategyName = Literal["groups", "planned", "uniform", "static_peak", "static_mean"]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
MAX_TICKS = 200_000
MAX_GROUPS = 20_000


def _check_bounds(low: int, high: int) -> None:
    if high < low:
        raise ValueError(f"max_replicas {high} < min_replicas {low}")


class ShapeSection(Section):
    """The model's routed experts, as far as time and memory need them."""

    layers: int = pydantic.Field(ge=1, le=1000, description="MoE layers.")
    first_layer: int = pydantic.Field(0, ge=0, description="Decoder layer of the first of them.")
    experts: int = pydantic.Field(ge=1, le=4096, description="Routed experts of each layer.")
    top_k: int = pydantic.Field(ge=1, description="Experts per row.")
    hidden_size: int = pydantic.Field(ge=1)
    intermediate_size: int = pydantic.Field(ge=1, description="Of one expert.")
    gated: bool = pydantic.Field(True, description="Three matrices per expert; otherwise two.")
    bytes_per_weight: Positive = pydantic.Field(2, description="1 for FP8, 2 for bf16.")
    bytes_per_activation: Positive = pydantic.Field(2, description="Of one element of a row.")

    @pydantic.model_validator(mode="after")
    def rows_find_experts(self) -> ShapeSection:
        if self.top_k > self.experts:
            raise ValueError(f"top_k: {self.top_k} experts per row, but a layer has {self.experts}")
        return self

    @property
    def cost(self) -> ExpertCost:
        weights = (3 if self.gated else 2) * self.hidden_size * self.intermediate_size
        row_bytes = 2 * self.hidden_size * self.bytes_per_activation
        return ExpertCost(2.0 * weights, weights * self.bytes_per_weight, row_bytes)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the decoder layers with routed experts."""
        return tuple(range(self.first_layer, self.first_layer + self.layers))


class DivisionSection(Section):
    """Every layer cut alike: neighbouring experts of neighbouring layers."""

    layers_per_group: int = pydantic.Field(ge=1)
    experts_per_group: int = pydantic.Field(ge=1, description="In each of these layers.")
    num_gpus: Positive = pydantic.Field(1, description="GPUs of one replica; may be a fraction.")
    min_replicas: int = pydantic.Field(1, ge=0)
    max_replicas: int = pydantic.Field(1000, ge=1)

    @pydantic.model_validator(mode="after")
    def bounds_ascend(self) -> DivisionSection:
        _check_bounds(self.min_replicas, self.max_replicas)
        return self


class PlannerSection(Section):
    """Of the strategy `planned`: groups by the planner, each over all layers, scaled alone."""

    every_s: Positive | None = pydantic.Field(
        None, description="Plan anew so often, by the loads since; default: once."
    )
    groups: int | None = pydantic.Field(None, ge=1, le=1024, description="Default: as many as are worth it.")
    memory_gib: Positive | None = pydantic.Field(None, description="Of experts that one replica may hold.")
    num_gpus: Positive = pydantic.Field(1, description="GPUs of one replica; may be a fraction.")
    min_replicas: int = pydantic.Field(1, ge=0)
    max_replicas: int = pydantic.Field(1000, ge=1)

    @pydantic.model_validator(mode="after")
    def bounds_ascend(self) -> PlannerSection:
        _check_bounds(self.min_replicas, self.max_replicas)
        return self


class BurstsSection(Section):
    """Spikes of all traffic at random times."""

    per_day: Positive
    factor: Annotated[float, pydantic.Field(gt=1, le=100)] = pydantic.Field(
        1.5, description="Load is multiplied by it."
    )
    duration_s: Positive = 300


class PopularitySection(Section):
    """Zipf by rank; each layer ranks its experts differently, and anew as time goes by."""

    exponent: float = pydantic.Field(1.0, ge=0, le=10, description="0: all experts alike.")
    switch_every_s: Positive | None = pydantic.Field(None, description="How often ranks change; left out: never.")
    switch_share: Share = pydantic.Field(0.25, description="Share of each layer's experts that change ranks then.")
    fade_s: NotNegative = pydantic.Field(
        0, description="How long a change takes; as long as switch_every_s is a steady drift, 0 a switch."
    )

    @pydantic.model_validator(mode="after")
    def fades_end(self) -> PopularitySection:
        if self.switch_every_s is not None and self.fade_s > self.switch_every_s:
            raise ValueError(f"fade_s {self.fade_s:g} > switch_every_s {self.switch_every_s:g}")
        return self


class TrafficSection(Section):
    peak_tokens_per_s: Positive = pydantic.Field(description="Through every MoE layer, without bursts.")
    trough_share: Share = pydantic.Field(0.3, description="Of the peak, at the quietest time of the day.")
    peak_at_h: float = pydantic.Field(14, ge=0, lt=24, description="Hour of the day; the simulation begins at 0.")
    noise: float = pydantic.Field(0.0, ge=0, le=1, description="Standard deviation of a tick's load over its mean.")
    tokens_per_step: int = pydantic.Field(256, ge=1, description="Rows of one router's step, which it dispatches.")
    bursts: BurstsSection | None = None
    popularity: PopularitySection = PopularitySection()


class StartSection(Section):
    """How long a replica takes from the decision to its first row, with a GPU at hand: (pull + process + weights over
    bandwidth) times a lognormal factor of median 1."""

    pull_s: NotNegative = pydantic.Field(5, description="Image, where it is not on the node yet; mean over starts.")
    process_s: NotNegative = pydantic.Field(8, description="Process, libraries, GPU context.")
    load_gb_per_s: Positive = pydantic.Field(2, description="At which weights are read, 10^9 bytes/s.")
    spread: float = pydantic.Field(0.25, ge=0, le=3, description="Standard deviation of the factor's logarithm.")
    drain_s: NotNegative = pydantic.Field(10, description="From a replica's removal to its GPU being free.")


class NodesSection(Section):
    gpus: int = pydantic.Field(8, ge=1, description="Of one node.")
    min_nodes: int = pydantic.Field(0, ge=0)
    max_nodes: int = pydantic.Field(100_000, ge=1, description="GPUs that can be had at all, in nodes.")
    provision_s: NotNegative = pydantic.Field(180, description="Median time from asking for a node to having it.")
    spread: float = pydantic.Field(0.25, ge=0, le=3, description="Standard deviation of the factor's logarithm.")
    idle_s: NotNegative = pydantic.Field(600, description="A node that is not needed for so long is given back.")

    @pydantic.model_validator(mode="after")
    def bounds_ascend(self) -> NodesSection:
        if self.max_nodes < self.min_nodes:
            raise ValueError(f"max_nodes {self.max_nodes} < min_nodes {self.min_nodes}")
        return self


class PolicySection(Section):
    tick_s: float = pydantic.Field(10, ge=1, le=60, description="The policy decides so often; also the step of loads.")
    delay_s: NotNegative = pydantic.Field(1, description="From a decision to the cluster acting on it.")
    metrics_age_s: NotNegative = pydantic.Field(1, description="Age of the loads that it decides on, beyond the tick.")


class ObjectiveSection(Section):
    layer_ms: Positive = pydantic.Field(20, description="A row's queue wait and service in one layer.")


class Scenario(Section):
    name: Name = "simulation"
    seed: int = pydantic.Field(0, ge=0)
    duration_s: Positive = 86400
    model: ShapeSection
    device: EmulatedDevice = pydantic.Field(description="What one replica computes on: a GPU, or its share of one.")
    division: DivisionSection | None = pydantic.Field(None, description="One of division, groups and plan.")
    groups: tuple[GroupSection, ...] | None = pydantic.Field(None, min_length=1, description="As a cluster's config.")
    plan: Path | None = pydantic.Field(None, description="File of `expertmesh plan`, relative to the scenario.")
    planner: PlannerSection | None = pydantic.Field(None, description="For the strategy planned, which needs it.")
    traffic: TrafficSection
    start: StartSection = StartSection()
    nodes: NodesSection = NodesSection()
    policy: PolicySection = PolicySection()
    scaling: ScalingSection = ScalingSection()
    objective: ObjectiveSection = ObjectiveSection()
    strategies: tuple[StrategyName, ...] = pydantic.Field(
        ("groups", "uniform", "static_peak", "static_mean"),
        min_length=1,
        description="groups: each scales alone; planned: so do groups that the planner makes; uniform: all as the "
        "hottest needs; static_peak, static_mean: fixed, each group sized for its own peak or mean, known in advance.",
    )

    @pydantic.model_validator(mode="after")
    def can_be_run(self) -> Scenario:
        given = [name for name in ("division", "groups", "plan") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"one of division, groups and plan is needed, given: {', '.join(given) or 'none'}")
        if self.ticks > MAX_TICKS:
            raise ValueError(f"duration_s: {self.ticks} ticks of {self.policy.tick_s:g} s; at most {MAX_TICKS}")
        if self.ticks < 1:
            raise ValueError(f"duration_s: {self.duration_s:g} s is less than a tick of {self.policy.tick_s:g} s")
        if len(set(self.strategies)) < len(self.strategies):
            raise ValueError("strategies: one stands twice")
        if "planned" in self.strategies and self.planner is None:
            raise ValueError("strategies: planned needs the section planner")
        stale_s, age_s = self.scaling.stale_after_s, self.policy.metrics_age_s
        if age_s > stale_s:
            raise ValueError(f"policy.metrics_age_s: {age_s:g} s, but scaling.stale_after_s {stale_s:g} ignores those")
        return self

    @property
    def ticks(self) -> int:
        return int(self.duration_s // self.policy.tick_s)


def read_scenario(path: Path) -> Scenario:
    """Relative paths start at the file's folder. Raises ConfigError with one line: file, key and problem."""
    scenario = read_model(path, Scenario, "a scenario begins with `model:`, `device:` and `traffic:`")
    if scenario.plan is None:
        return scenario
    return scenario.model_copy(update={"plan": path.parent / scenario.plan})
