"""`expertmesh kubernetes status` as people read it, of a RayService and its pods on a real API server."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from kuberay_stand_in import PodObject, RayServiceObject
from kubernetes_testbed import ApiServer

from expertmesh.kubernetes.bounds import Bounds
from expertmesh.kubernetes.serve_text import set_bounds

pytestmark = pytest.mark.kubernetes


def status(server: ApiServer, namespace: str) -> tuple[list[str], list[list[str]]]:
    """Its lines before the tables, and the cells of each row of the tables."""
    command = [sys.executable, "-m", "expertmesh", "kubernetes", "status", "-n", namespace, "--context", "admin"]
    environment = server.environment | {"COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if not re.match("[┏┡└]", line)]
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[0] in "│┃"]
    return [line for line in lines if line[0] not in "│┃"], rows


def test_before_the_operator_has_seen_it(api_server: ApiServer, namespace: str, ray_service: RayServiceObject) -> None:
    lines, rows = status(api_server, namespace)
    assert lines == [
        f"RayService {namespace}/mesh: no Ray cluster yet",
        "0 pods take requests",
        "! the operator has not seen the last change yet: generation 0 of 1",
    ]
    assert rows == [
        ["application", "status", "message"],
        *([name, "ABSENT", ""] for name in ("directory", "experts-cold", "experts-hot", "router")),
        ["group", "replicas", "ready", "status", "deployment", "pool"],
        ["hot", "1 to 2", "", "ABSENT", "", "experts"],
        ["cold", "1 to 1", "", "ABSENT", "", "experts"],
    ]


def test_tables(api_server: ApiServer, namespace: str, ray_service: RayServiceObject) -> None:
    ray_service.write(set_bounds(ray_service.text, "hot", Bounds(0, 7)))
    ray_service.report({"router": "RUNNING", "experts-hot": "DEPLOY_FAILED", "experts-gone": "DELETING"})
    connection = ray_service.connection
    for name, pool, phase, ready, restarts in (
        ("mesh-w-2", "experts", "Pending", False, 0),
        ("mesh-w-1", "experts", "Running", True, 3),
        ("mesh-r-1", "router", "Running", True, 0),
        ("mesh-head", "", "Running", True, 0),
    ):
        one = PodObject(connection, name, pool, None if phase == "Pending" else "node-1")
        one.create()
        one.report(phase, ready=ready, restarts=restarts)
    lines, rows = status(api_server, namespace)
    assert lines == [f"RayService {namespace}/mesh: mesh-abcde", "2 pods take requests"]
    assert rows == [
        ["condition", "status", "reason", "message"],
        ["Ready", "True", "X", "[x] y"],
        ["application", "status", "message"],
        ["directory", "ABSENT", ""],
        ["experts-cold", "ABSENT", ""],
        ["experts-gone", "DELETING", ""],
        ["experts-hot", "DEPLOY_FAILED", "no node has a GPU"],
        ["router", "RUNNING", ""],
        ["group", "replicas", "ready", "status", "deployment", "pool"],
        ["hot", "0 to 7", "", "DEPLOY_FAILED", "HEALTHY", "experts"],
        ["cold", "1 to 1", "", "ABSENT", "", "experts"],
        ["role", "pool", "pod", "phase", "ready", "restarts", "node"],
        ["head", "", "mesh-head", "Running", "yes", "0", "node-1"],
        ["router", "router", "mesh-r-1", "Running", "yes", "0", "node-1"],
        ["experts", "experts", "mesh-w-1", "Running", "yes", "3", "node-1"],
        ["experts", "experts", "mesh-w-2", "Pending", "no", "0", ""],
    ]
