"""A RayService as plain values: what its spec asks for and what KubeRay's operator wrote into its status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic

READY, UPGRADING = "Ready", "UpgradeInProgress"
"""Types of KubeRay's conditions (1.6 to 1.7)."""
TERMINAL_REASONS = frozenset({"ValidationFailed", "InitializingTimeout"})
"""Of the Ready condition: the operator does nothing more until the RayService is changed, or made anew."""


class Value(pydantic.BaseModel, frozen=True):
    pass


class Condition(Value):
    type: str
    status: str
    """True, False or Unknown."""
    reason: str
    message: str


class DeploymentStatus(Value):
    name: str
    status: str
    message: str


class ApplicationStatus(Value):
    """As Ray Serve told the operator, which asks every 2 s or so."""

    name: str
    status: str
    message: str
    deployments: tuple[DeploymentStatus, ...] = ()


class Service(Value):
    namespace: str
    name: str
    resource_version: str
    generation: int
    """Grows with every change of the spec."""
    observed_generation: int
    """The last one that the operator has worked on; 0: none."""
    serve_config: str
    """spec.serveConfigV2."""
    conditions: tuple[Condition, ...]
    applications: tuple[ApplicationStatus, ...]
    """Of the Ray cluster that serves."""
    active_cluster: str
    pending_cluster: str
    """Of an upgrade under way, or of the first start; empty otherwise."""
    pools: tuple[str, ...]
    """Names of the worker groups."""
    endpoints: int
    """Pods that take requests."""

    @property
    def where(self) -> str:
        return f"RayService {self.namespace}/{self.name}"

    def condition(self, kind: str) -> Condition | None:
        return next((one for one in self.conditions if one.type == kind), None)

    def application(self, name: str) -> ApplicationStatus | None:
        return next((one for one in self.applications if one.name == name), None)


def read_service(found: Mapping[str, Any]) -> Service:
    """Fields that the operator has not written yet are empty."""
    metadata, spec, status = found["metadata"], found.get("spec") or {}, found.get("status") or {}
    active, pending = (status.get(key) or {} for key in ("activeServiceStatus", "pendingServiceStatus"))
    pools = (spec.get("rayClusterConfig") or {}).get("workerGroupSpecs") or []
    return Service(
        namespace=metadata["namespace"],
        name=metadata["name"],
        resource_version=metadata["resourceVersion"],
        generation=metadata.get("generation", 0),
        observed_generation=status.get("observedGeneration", 0),
        serve_config=spec.get("serveConfigV2") or "",
        conditions=tuple(_condition(one) for one in status.get("conditions") or []),
        applications=tuple(
            _application(name, one) for name, one in sorted((active.get("applicationStatuses") or {}).items())
        ),
        active_cluster=active.get("rayClusterName") or "",
        pending_cluster=pending.get("rayClusterName") or "",
        pools=tuple(one["groupName"] for one in pools),
        endpoints=status.get("numServeEndpoints", 0),
    )


def _condition(found: Mapping[str, Any]) -> Condition:
    return Condition(
        type=found["type"], status=found["status"], reason=found.get("reason", ""), message=found.get("message", "")
    )


def _application(name: str, found: Mapping[str, Any]) -> ApplicationStatus:
    deployments = found.get("serveDeploymentStatuses") or {}
    return ApplicationStatus(
        name=name,
        status=found.get("status", ""),
        message=_one_line(found.get("message")),
        deployments=tuple(
            DeploymentStatus(name=key, status=one.get("status", ""), message=_one_line(one.get("message")))
            for key, one in sorted(deployments.items())
        ),
    )


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
