"""When a change counts as arrived, by what the operator reports."""

from __future__ import annotations

from typing import Any

import pytest

from expertmesh.kubernetes.goal import Goal, judge
from expertmesh.kubernetes.service import Service, read_service

GOAL = Goal(generation=3, running=frozenset({"a", "b"}), gone=frozenset({"old"}), ready=True)


def service(
    applications: dict[str, str], observed: int = 3, ready: str = "True", reason: str = "", upgrading: str = "False"
) -> Service:
    conditions = [
        {"type": "Ready", "status": ready, "reason": reason or "NonZeroServeEndpoints", "message": "two\nlines"},
        {"type": "UpgradeInProgress", "status": upgrading, "reason": "NoPendingCluster"},
    ]
    statuses = {name: {"status": status, "message": "said\nso"} for name, status in applications.items()}
    found: dict[str, Any] = {
        "metadata": {"namespace": "n", "name": "s", "resourceVersion": "7", "generation": 3},
        "spec": {},
        "status": {
            "observedGeneration": observed,
            "conditions": conditions,
            "activeServiceStatus": {"applicationStatuses": statuses, "rayClusterName": "s-1"},
            "pendingServiceStatus": {"rayClusterName": "s-2"},
        },
    }
    return read_service(found)


RUN = {"a": "RUNNING", "b": "RUNNING"}


@pytest.mark.parametrize(
    ("found", "state", "detail"),
    [
        (service(RUN), "reached", ""),
        (service(RUN | {"c": "DEPLOY_FAILED"}), "reached", ""),
        (service(RUN, observed=2), "awaited", "the operator has seen generation 2, not 3"),
        (service({"a": "RUNNING"}), "awaited", "b: absent"),
        (service(RUN | {"b": "DEPLOYING"}), "awaited", "b: DEPLOYING, said so"),
        (service(RUN | {"b": "UNHEALTHY"}), "awaited", "b: UNHEALTHY, said so"),
        (service({"a": "DEPLOYING", "b": "DEPLOY_FAILED"}), "failed", "b: DEPLOY_FAILED, said so"),
        (service({"b": "DEPLOY_FAILED"}, observed=2), "awaited", "the operator has seen generation 2, not 3"),
        (service(RUN | {"old": "DELETING"}), "awaited", "old: DELETING"),
        (service(RUN, ready="False", reason="ZeroServeEndpoints"), "awaited", "not ready: ZeroServeEndpoints"),
        (service(RUN, upgrading="True"), "awaited", "an upgrade to s-2 is under way"),
        (service(RUN, observed=2, ready="False", reason="ValidationFailed"), "failed", "ValidationFailed: two lines"),
    ],
)
def test_verdicts(found: Service, state: str, detail: str) -> None:
    verdict = judge(found, GOAL)
    assert (verdict.state, verdict.detail) == (state, detail)


def test_many_are_summed_up() -> None:
    goal = Goal(1, running=frozenset(f"experts-{number}" for number in range(320)))
    detail = judge(service({}), goal).detail
    assert detail.count("absent") == 4 and detail.endswith("and 316 more")


def test_what_the_operator_has_not_written_yet_is_empty() -> None:
    found = read_service({"metadata": {"namespace": "n", "name": "s", "resourceVersion": "1"}})
    assert (found.conditions, found.applications, found.active_cluster, found.serve_config) == ((), (), "", "")
    assert judge(found, Goal(1, ready=True)).state == "awaited"
