"""What `expertmesh kubernetes status` shows: a RayService, its pods and the directory's replicas as one value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from expertmesh.args import experts_application
from expertmesh.kubernetes.pods import Pod, pool_of
from expertmesh.kubernetes.serve_text import read_groups
from expertmesh.kubernetes.service import ApplicationStatus, Condition, Service, Value

ABSENT = "ABSENT"
"""Status of an application that the operator has not reported."""


class GroupReport(Value):
    name: str
    min_replicas: int
    max_replicas: int
    status: str
    """Of its application, as Ray Serve has it."""
    detail: str
    """What Ray Serve says of its deployment."""
    pool: str
    """Worker group that its replicas ask for; empty where any will do."""
    ready: int | None
    """Replicas that the directory holds ready; None: the directory was not asked."""


class Report(Value):
    namespace: str
    name: str
    generation: int
    observed_generation: int
    active_cluster: str
    pending_cluster: str
    endpoints: int
    conditions: tuple[Condition, ...]
    applications: tuple[ApplicationStatus, ...]
    """Those of the Serve config and those that still run, by name."""
    groups: tuple[GroupReport, ...]
    pods: tuple[Pod, ...]

    @property
    def current(self) -> bool:
        """Whether the operator has seen the last change."""
        return self.observed_generation >= self.generation


def make_report(service: Service, pods: Sequence[Pod], wanted: Iterable[str], ready: dict[str, int] | None) -> Report:
    """`wanted` are the applications of the Serve config, `ready` the directory's ready replicas per group.

    Raises ConfigError where the Serve config is none.
    """
    bounds = read_groups(service.serve_config)
    names = sorted({*wanted, *(one.name for one in service.applications)})
    return Report(
        namespace=service.namespace,
        name=service.name,
        generation=service.generation,
        observed_generation=service.observed_generation,
        active_cluster=service.active_cluster,
        pending_cluster=service.pending_cluster,
        endpoints=service.endpoints,
        conditions=service.conditions,
        applications=tuple(
            service.application(name) or ApplicationStatus(name=name, status=ABSENT, message="") for name in names
        ),
        groups=tuple(
            GroupReport(
                name=group,
                min_replicas=one.least,
                max_replicas=one.most,
                pool=pool_of(service, group),
                ready=None if ready is None else ready.get(group, 0),
                **_serve(service.application(experts_application(group))),
            )
            for group, one in bounds.items()
        ),
        pods=tuple(pods),
    )


def _serve(found: ApplicationStatus | None) -> dict[str, str]:
    if found is None:
        return {"status": ABSENT, "detail": ""}
    said = [f"{one.status}{f': {one.message}' if one.message else ''}" for one in found.deployments]
    return {"status": found.status, "detail": "; ".join(said) or found.message}
