"""Waiting for a cluster beside a dashboard that is short of time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, cast

import pytest

from expertmesh.cluster import launch
from expertmesh.cluster.readiness import Step
from expertmesh.cluster.record import Record
from expertmesh.cluster.serve_api import DashboardSilent
from expertmesh.errors import ClusterError

PLAN = cast(launch.Plan, SimpleNamespace(applications={"router": None}))
READY = {"status": "RUNNING", "message": "", "deployments": {"R": {"replicas": [], "target_num_replicas": 0}}}


class Dashboard(ThreadingHTTPServer):
    """Hangs up on the first calls, as many as `silent`; then answers `answer` with `status`."""

    silent = 0
    status = 200
    answer: Any = {"applications": {"router": READY}}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        dashboard = cast(Dashboard, self.server)
        if dashboard.silent:
            dashboard.silent -= 1
            return
        body = json.dumps(dashboard.answer).encode()
        self.send_response(dashboard.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    with Dashboard(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def wait(dashboard: Dashboard) -> list[Step]:
    url = f"http://127.0.0.1:{dashboard.server_address[1]}"
    record = Record(name="c", config="c", dashboard=url, http="http://x", directory="127.0.0.1:9", model="m")
    shown: list[Step] = []
    launch.wait_until_ready(PLAN, record, 60, shown.extend)
    return shown


def test_calls_without_an_answer_are_made_again(dashboard: Dashboard) -> None:
    dashboard.silent = 2
    assert [(step.application, step.done) for step in wait(dashboard)] == [("router", True)]
    assert dashboard.silent == 0


def test_one_that_stays_silent_is_told(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SILENT_S", 0.6)
    dashboard.silent = 1000
    with pytest.raises(DashboardSilent, match=r"^Ray's dashboard at http://127\.0\.0\.1:\d+ does not answer: .+"):
        wait(dashboard)


def test_a_refusal_is_told_at_once(dashboard: Dashboard) -> None:
    dashboard.status, dashboard.answer = 401, "who are you?"
    with pytest.raises(ClusterError, match="refused GET /api/serve/applications/: 401"):
        wait(dashboard)
