"""What `up` waits for: each application in Ray Serve, and each group's replicas in the directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from expertmesh.cluster.serve_api import Details, meaning
from expertmesh.v1 import directory_pb2, expert_pb2

MAX_TROUBLE = 160
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


@dataclass(frozen=True)
class Step:
    """One application on its way."""

    application: str
    status: str
    """Ray Serve's word for it."""
    detail: str
    done: bool
    error: str = ""
    """One line where it has failed."""


def steps(applications: Mapping[str, str | None], details: Details, table: directory_pb2.Table | None) -> list[Step]:
    """Where each application stands; `applications` gives its group where it has one, `table` is None while away."""
    found = details.get("applications", {})
    return [_step(name, group, found.get(name, {}), table) for name, group in applications.items()]


def _step(name: str, group: str | None, application: Details, table: directory_pb2.Table | None) -> Step:
    status = application.get("status", "NOT_STARTED")
    deployments = application.get("deployments", {})
    running = sum(_running(deployment) for deployment in deployments.values())
    target = sum(target_replicas(deployment) for deployment in deployments.values())
    detail, done = f"{running} of {target} replicas" if deployments else "", status == "RUNNING"
    if group is not None:
        announced = ready_replicas(table, group)
        asleep = bool(deployments) and done and not target
        detail = "asleep" if asleep else f"{detail}, {announced} in the directory" if detail else ""
        done = done and (asleep or announced >= max(1, running))
    messages = [application.get("message", ""), *(one.get("message", "") for one in deployments.values())]
    if status in FAILED:
        error = next((text for text in map(meaning, reversed(messages)) if text), status)
        return Step(name, status, detail, False, error)
    if not done and (trouble := next((_trouble(text) for text in messages[1:] if text), "")):
        detail += f"; {trouble[:MAX_TROUBLE]}"
    return Step(name, status, detail, done)


def _trouble(message: str) -> str:
    return meaning(message) if "rror" in message else message.strip().partition("\n")[0]


def ready_replicas(table: directory_pb2.Table | None, group: str) -> int:
    if table is None:
        return 0
    return sum(one.group == group and one.state == expert_pb2.REPLICA_STATE_READY for one in table.replicas)


def _running(deployment: Details) -> int:
    return sum(replica["state"] == "RUNNING" for replica in deployment.get("replicas", []))


def target_replicas(deployment: Details) -> int:
    return int(deployment.get("target_num_replicas") or 0)
