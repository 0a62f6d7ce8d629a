"""What a config asks of a Ray cluster, and whether the cluster has it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertmesh.config import ClusterConfig
from expertmesh.errors import ConfigError

NodeResources = Mapping[str, float]
"""Ray's resources of one node in total: CPU, GPU, …"""
ROUTER_ACTOR_CPUS = 1
"""Of the Ray Serve LLM replica beside its engine."""
INGRESS = ("router's ingress", 1, 1, 0)
PLENTY = 1e6
SPARE_CPUS = 8
"""For replicas that a changed config adds to a running cluster."""


@dataclass(frozen=True)
class Demand:
    """Replicas of one kind and what each of them takes."""

    what: str
    replicas: int
    num_cpus: float
    num_gpus: float

    def takes(self, resource: str) -> float:
        return {"CPU": self.num_cpus, "GPU": self.num_gpus}[resource]


def demands(config: ClusterConfig, *, at_most: bool = False) -> list[Demand]:
    """Of the router and each group with their fewest replicas; with `at_most`, with as many as they may have."""
    engine = config.engine
    count = engine.max_replicas if at_most else engine.min_replicas
    found = [Demand("router", count, engine.num_cpus + ROUTER_ACTOR_CPUS, engine.num_gpus)]
    found.append(Demand(*INGRESS))
    for group in config.groups:
        count = group.max_replicas if at_most else group.min_replicas
        found.append(Demand(f"group {group.name}", count, group.num_cpus, group.num_gpus))
    return found


def logical_cpus(config: ClusterConfig) -> int:
    """CPUs that a local Ray cluster must claim so that all replicas can be placed, however many cores there are."""
    return math.ceil(sum(one.replicas * one.num_cpus for one in demands(config, at_most=True))) + SPARE_CPUS


def custom_resources(config: ClusterConfig) -> dict[str, float]:
    """The custom Ray resources that sections name, of which a local node gets more than any config asks."""
    named = {name for resources in _named(config).values() for name in resources}
    return dict.fromkeys(sorted(named), PLENTY)


def check_room(config: ClusterConfig, nodes: Sequence[NodeResources]) -> None:
    """Raises ConfigError that says what is short where the fewest replicas cannot all be placed on `nodes`."""
    wanted = demands(config)
    for where, resources in _named(config).items():
        for name, amount in resources.items():
            if not any(node.get(name, 0.0) >= amount for node in nodes):
                raise ConfigError(f"{where}: resources: no node of the cluster has {amount:g} {name}")
    for resource in ("GPU", "CPU"):
        per_node = [node.get(resource, 0.0) for node in nodes]
        has = f"the cluster has {_count(sum(per_node), resource)}"
        for one in wanted:
            each = one.takes(resource)
            need = f"{one.what}: {one.replicas} replica{'s' * (one.replicas > 1)} x {_count(each, resource)} do not fit"
            if one.replicas * each > sum(per_node):
                raise ConfigError(f"{need}: {has}")
            if one.replicas and each > max(per_node, default=0.0):
                raise ConfigError(f"{need}: the largest node has {_count(max(per_node, default=0.0), resource)}")
        total = sum(one.replicas * one.takes(resource) for one in wanted)
        if total > sum(per_node):
            raise ConfigError(f"router and groups need {_count(total, resource)} together, {has}")


def out_of_reach(config: ClusterConfig, nodes: Sequence[NodeResources]) -> list[str]:
    """One line for each group whose max_replicas have no room on `nodes`, even alone: they need a node autoscaler."""
    lines = []
    for group in config.groups:
        each = {"CPU": group.num_cpus, "GPU": group.num_gpus, **group.resources}
        room = sum(_fit(node, each) for node in nodes)
        if room < group.max_replicas:
            lines.append(
                f"group {group.name}: max_replicas {group.max_replicas} is out of reach: the nodes that are there have "
                f"room for {room}, and more replicas wait until nodes are added"
            )
    return lines


def _named(config: ClusterConfig) -> dict[str, Mapping[str, float]]:
    """Custom Ray resources by the section that names them."""
    return {
        "engine": config.engine.resources,
        "directory": config.directory.resources,
        **{f"group {one.name}": one.resources for one in config.groups},
    }


def _fit(node: NodeResources, each: Mapping[str, float]) -> int:
    """Replicas of `each` that an empty node has room for."""
    return min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in each.items() if amount)


def _count(number: float, resource: str) -> str:
    return f"{number:g} {resource}{'s' * (number != 1)}"
