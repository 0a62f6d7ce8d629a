"""Pods of a RayService, and what they log."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import urllib3
from kubernetes.client import ApiException, CoreV1Api

from expertmesh.errors import ClusterError, ConfigError
from expertmesh.kubernetes.connection import Connection
from expertmesh.kubernetes.groups import OPTIONS
from expertmesh.kubernetes.ray_services import TIMEOUT_S
from expertmesh.kubernetes.refusals import refusal
from expertmesh.kubernetes.serve_text import bounds_of, experts_override, group_applications
from expertmesh.kubernetes.service import Service, Value

CLUSTER, NODE_TYPE, POOL = "ray.io/cluster", "ray.io/node-type", "ray.io/group"
"""KubeRay's labels on pods."""
COMPONENT = "app.kubernetes.io/component"
"""The chart's."""
ROUTER_POOL = "router"
SILENT_S = 7 * 86400.0
"""A log that is followed may be without a line for so long: the client takes no timeout that is unlimited."""
Role = Literal["head", "router", "experts"]
ROLES: tuple[Role, ...] = ("head", "router", "experts")


class Pod(Value):
    name: str
    role: Role
    pool: str
    """Its worker group; empty for the head."""
    cluster: str
    phase: str
    ready: bool
    restarts: int
    node: str
    containers: tuple[str, ...]


def role_of(labels: Mapping[str, str]) -> Role:
    """By the chart's label, and where that is missing by KubeRay's."""
    if labels.get(NODE_TYPE) == "head":
        return "head"
    said = labels.get(COMPONENT) or labels.get(POOL)
    return "router" if said == ROUTER_POOL else "experts"


def pool_of(service: Service, group: str) -> str:
    """The worker group that a group's replicas ask for by a custom resource of its name; empty where they ask for none.

    Raises ConfigError naming the groups that there are.
    """
    bounds_of(service.serve_config, group)
    override = experts_override(group_applications(service.serve_config)[group])
    wanted = (override.get(OPTIONS) or {}).get("resources") or {}
    return next((pool for pool in service.pools if pool in wanted), "")


def chosen(pods: Sequence[Pod], service: Service, role: Role, group: str | None) -> list[Pod]:
    """Raises ConfigError where there is no such group, or no pod."""
    pool = pool_of(service, group) if group else ""
    found = [pod for pod in pods if pod.role == role and pool in ("", pod.pool)]
    if not found:
        of = f" of pool {pool}, where group {group} runs," if pool else ""
        raise ConfigError(f"{service.where} has no {role} pod{of} now")
    return found


class Pods:
    """Every method raises ClusterError with one line where the API server refuses or does not answer."""

    def __init__(self, connection: Connection) -> None:
        self._namespace = connection.namespace
        self._url = connection.url
        self._api = CoreV1Api(connection.api)

    def of(self, service: Service) -> list[Pod]:
        clusters = [name for name in (service.active_cluster, service.pending_cluster) if name]
        if not clusters:
            return []
        selector = f"{CLUSTER} in ({','.join(clusters)})"
        try:
            found = self._api.list_namespaced_pod(self._namespace, label_selector=selector, _request_timeout=TIMEOUT_S)
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            raise refusal(error, "list pods", self._namespace, self._url) from None
        pods = [_pod(one) for one in found.items]
        return sorted(pods, key=lambda pod: (ROLES.index(pod.role), pod.pool, pod.name))

    def lines(self, pod: Pod, *, follow: bool, tail: int | None) -> Iterator[str]:
        """Of its first container, which is Ray's; with `follow` until the pod ends."""
        options: dict[str, Any] = {"tail_lines": tail} if tail is not None else {}
        timeout = (TIMEOUT_S[0], SILENT_S) if follow else TIMEOUT_S
        try:
            answer = self._api.read_namespaced_pod_log(
                pod.name,
                self._namespace,
                container=pod.containers[0],
                follow=follow,
                _preload_content=False,
                _request_timeout=timeout,
                **options,
            )
            if answer.status == 204:
                raise ClusterError(f"pod {pod.name} has no log: it is on no node yet")
            if answer.status != 200:
                raise ApiException(status=answer.status, reason=answer.reason, body=answer.read().decode())
            for line in answer:  # the last one too, of a process that ended within it
                yield line.decode(errors="replace").removesuffix("\n")
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            raise refusal(error, f"get pods/log of {pod.name}", self._namespace, self._url) from None


def merged(sources: Mapping[str, Iterator[str]], failed: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """(source, line) of all sources as they come, each read on a thread of its own.

    `failed` is told of those that break. Raises ClusterError where all of them do, with what the last one met.
    """
    lines: queue.Queue[tuple[str, str | None, str]] = queue.Queue(maxsize=10_000)

    def read(name: str, source: Iterator[str]) -> None:
        problem = f"{name}: not read to its end"  # whatever else it raises, nobody waits for it
        try:
            for line in source:
                lines.put((name, line, ""))
            problem = ""
        except ClusterError as error:
            problem = str(error)
        finally:
            lines.put((name, None, problem))

    for name, source in sources.items():
        threading.Thread(target=read, args=(name, source), daemon=True).start()
    left, broken = len(sources), 0
    while left:
        name, line, problem = lines.get()
        if line is not None:
            yield name, line
            continue
        left -= 1
        broken += bool(problem)
        if broken == len(sources):
            raise ClusterError(problem)
        if problem:
            failed(problem)


def _pod(found: Any) -> Pod:
    labels, status = found.metadata.labels or {}, found.status
    role = role_of(labels)
    conditions = {one.type: one.status for one in status.conditions or []}
    return Pod(
        name=found.metadata.name,
        role=role,
        pool="" if role == "head" else labels.get(POOL, ""),
        cluster=labels.get(CLUSTER, ""),
        phase="Terminating" if found.metadata.deletion_timestamp else status.phase or "Unknown",
        ready=conditions.get("Ready") == "True",
        restarts=sum(one.restart_count for one in status.container_statuses or []),
        node=found.spec.node_name or "",
        containers=tuple(one.name for one in found.spec.containers),
    )
