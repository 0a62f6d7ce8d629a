"""A plan: a proposed division of experts into groups, with what was predicted for it."""

from __future__ import annotations

import json
from pathlib import Path

import pydantic

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import ClusterConfig, GroupSection, Section
from expertmesh.coverage import check_coverage
from expertmesh.errors import ConfigError
from expertmesh.yaml_file import read_model


class Prediction(Section):
    """What the planner expects of a plan under the loads that it was made for."""

    balancedness: float = pydantic.Field(description="Mean over layers of mean / maximum load per replica, 0 to 1.")
    worst_layer_balancedness: float
    replicas: int = pydantic.Field(description="Of all groups together, at these loads.")
    memory_gib: float = pydantic.Field(description="Expert weights of all replicas together, GiB.")
    replica_seconds_per_hour: float = pydantic.Field(description="At these loads held for an hour.")
    group_replicas: dict[str, int] = pydantic.Field({}, description="Replicas of each group at these loads.")


class Plan(Section):
    """Routers never read it: they follow the directory."""

    fingerprint: str = pydantic.Field(description="Of the model that it divides.")
    groups: tuple[GroupSection, ...] = pydantic.Field(min_length=1)
    predicted: Prediction | None = None

    @pydantic.model_validator(mode="after")
    def group_names_differ(self) -> Plan:
        names = [group.name for group in self.groups]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"groups: {min(twice)!r} stands twice")
        return self

    @pydantic.model_validator(mode="after")
    def predicted_replicas_fit(self) -> Plan:
        most = {group.name: group.max_replicas for group in self.groups}
        for name, count in (self.predicted.group_replicas if self.predicted else {}).items():
            if name not in most:
                raise ValueError(f"predicted.group_replicas: no group is called {name!r}")
            if count > most[name]:
                raise ValueError(f"predicted.group_replicas: {count} of {name}, whose max_replicas is {most[name]}")
        return self


def read_plan_file(path: Path) -> Plan:
    """Raises ConfigError with one line: the file, the key and what is wrong with it."""
    return read_model(path, Plan, "a plan begins with `fingerprint:` and `groups:`; `expertmesh plan` makes one")


def check_plan(plan: Plan, config: ClusterConfig, manifest: Manifest) -> ClusterConfig:
    """The cluster's config with the plan's groups; raises ConfigError where the plan is of another model, leaves an
    expert out, names one that does not exist or exceeds a group's memory."""
    if plan.fingerprint != manifest.fingerprint:
        raise ConfigError(
            f"plan: made for the model with fingerprint {plan.fingerprint[:12]}, "
            f"{config.model.artifact} has {manifest.fingerprint[:12]}"
        )
    changed = config.model_copy(update={"groups": plan.groups})
    check_coverage(changed, manifest)
    return changed


def plan_text(plan: Plan) -> str:
    """The plan as JSON, which is YAML too; `read_plan_file` reads it back."""
    return json.dumps(plan.model_dump(mode="json", exclude_none=True), indent=2) + "\n"
