"""The groups that a Serve config deploys, as a cluster config would have them, and back: pure functions.

A RayService holds no cluster config. What a new group shares with all others, such as artifact, ports and TLS files, is
taken from one that runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from expertmesh.args import GroupArgs, experts_application
from expertmesh.artifact.manifest import ExpertFunction, Manifest
from expertmesh.config import (
    ClusterConfig,
    DirectorySection,
    GroupSection,
    ModelSection,
    ScalingSection,
    SecuritySection,
    ServerSection,
)
from expertmesh.deployment import serve_config
from expertmesh.errors import ConfigError
from expertmesh.experts import format_indices, parse_indices
from expertmesh.kubernetes.bounds import AUTOSCALING, FIXED, USER_CONFIG, read_bounds
from expertmesh.kubernetes.serve_text import Application, experts_override
from expertmesh.yaml_file import first_problem

OWN_ARGS = ("group", "experts", "num_threads", "device", "emulated", "max_queued_rows")
"""Of GroupArgs, what differs from group to group."""
OPTIONS = "ray_actor_options"


def read_group(application: Application) -> GroupSection:
    """Raises ConfigError where the application is not one that `deployment.serve_config` makes."""
    name, override = application["name"], experts_override(application)
    bounds, options = read_bounds(override), override.get(OPTIONS) or {}
    try:
        args = GroupArgs.model_validate(application.get("args") or {})
        return GroupSection(
            name=args.group,
            experts=args.experts,
            num_cpus=options.get("num_cpus", 1),
            num_gpus=options.get("num_gpus", 0),
            resources=options.get("resources") or {},
            min_replicas=bounds.least,
            max_replicas=bounds.most,
            scaling=_targets(override),
            emulated=args.emulated,
            max_queued_rows=args.max_queued_rows,
        )
    except pydantic.ValidationError as error:
        raise ConfigError(f"serveConfigV2: application {name}: {first_problem(error)}") from None


def make_application(group: GroupSection, like: Application) -> Application:
    """The application of a new group beside `like`, which runs; keys of it that are not known here are kept."""
    args = GroupArgs.model_validate(like["args"])
    config = ClusterConfig(
        model=ModelSection(artifact=Path(args.artifact)),
        groups=(group,),
        server=_server(args),
        security=SecuritySection(tls=args.tls),
        directory=DirectorySection(lease_ms=args.lease_ms),
    )
    made = {one["name"]: one for one in serve_config(config, known_model([group]))["applications"]}
    own = made[experts_application(group.name)]
    old, new = experts_override(like), experts_override(own)
    override = {key: value for key, value in old.items() if key not in (AUTOSCALING, FIXED, OPTIONS)}
    override |= {**new, OPTIONS: {**(old.get(OPTIONS) or {}), **new[OPTIONS]}}
    own_args = {**like["args"], **{key: own["args"][key] for key in OWN_ARGS}}
    return {**like, "name": own["name"], "args": own_args, "deployments": [override]}


def _server(args: GroupArgs) -> ServerSection:
    """In which the directory's port is the group's, and all others are other ones."""
    port = int(args.directory.rpartition(":")[2])
    if args.tls is None:
        return ServerSection(http_port=1, grpc_port=port)
    return ServerSection(http_port=1, grpc_port=2, grpc_tls_port=port)


def filled(groups: Iterable[GroupSection], running: Sequence[GroupSection]) -> tuple[GroupSection, ...]:
    """A plan's groups with what a cluster config would add: scaling targets, and the pool where all groups share one.

    Where a group says nothing of its targets, they are those of the group of the same name, or most groups'. What one
    replica may hold is checked when a plan is made, and not part of a Serve config. Raises ConfigError where a group's
    pool is not known.
    """
    now = {group.name: group for group in running}
    common = Counter(group.scaling for group in running).most_common(1)[0][0] if running else None
    pools = [dict(pool) for pool in {tuple(sorted(group.resources.items())) for group in running}]
    done = []
    for group in groups:
        resources = group.resources
        if not resources and pools and {} not in pools:
            if len(pools) > 1:
                named = ", ".join(sorted({key for pool in pools for key in pool}))
                raise ConfigError(f"plan: group {group.name}: resources: name the pool it runs in, one of {named}")
            resources = pools[0]
        scaling = group.scaling or (now[group.name].scaling if group.name in now else common)
        done.append(group.model_copy(update={"resources": resources, "scaling": scaling, "memory_gib": None}))
    return tuple(done)


def known_model(groups: Iterable[GroupSection]) -> Manifest:
    """A model's manifest with as much as its groups tell: its layers and their experts. All else is empty."""
    lasts: dict[int, int] = {}
    everywhere = 0
    for group in groups:
        where = f"group {group.name}: experts"
        if isinstance(group.experts, str):
            everywhere = max(everywhere, *parse_indices(group.experts, where), 0)
            continue
        for layers, experts in group.experts.items():
            for layer in parse_indices(layers, where):
                lasts[layer] = max(lasts.get(layer, 0), *parse_indices(experts, where), 0)
    counts = {layer: max(last, everywhere) + 1 for layer, last in sorted(lasts.items())}
    return Manifest(
        name="",
        architecture="",
        model_type="",
        hidden_size=0,
        intermediate_size=0,
        layers=counts or {0: everywhere + 1},
        top_k=0,
        dtype="float32",
        expert_function=ExpertFunction(activation=""),
        fingerprint="",
        expert_bytes=0,
    )


def check_covers(groups: Sequence[GroupSection], model: Manifest) -> None:
    """Raises ConfigError where the groups leave an expert of the model out, or name one that it has not."""
    held = [group.expert_sets(model) for group in groups]
    for layer, count in model.layers.items():
        missing = frozenset(range(count)).difference(*(one.get(layer, frozenset()) for one in held))
        if missing:
            raise ConfigError(f"plan: layer {layer}: no group holds experts {format_indices(missing)}")


def _targets(override: Mapping[str, Any]) -> ScalingSection | None:
    targets = (override.get(USER_CONFIG) or {}).get("scaling")
    return None if targets is None else ScalingSection.model_validate(targets)
