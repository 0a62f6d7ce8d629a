"""Ray's REST API, as far as we use it: Serve's applications and the nodes' resources."""

from __future__ import annotations

import re
import time
from typing import Any

import httpx

from expertmesh.errors import ClusterError

APPLICATIONS = "/api/serve/applications/"
NODES = "/api/v0/nodes"
DELETING = "DELETING"
DELETION_S = 60.0
Details = dict[str, Any]
"""Ray Serve's ServeInstanceDetails."""


class DashboardSilent(ClusterError):
    """It did not answer, or not in time; it may a moment later."""


class ServeApi:
    """Each call raises ClusterError where the dashboard at `address` refuses, DashboardSilent where it does not answer
    in time."""

    def __init__(self, address: str, token: str | None) -> None:
        self._address = address.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def details(self) -> Details:
        found: Details = self._request("GET", APPLICATIONS).json()
        return found

    def deploy(self, serve_config: dict[str, Any]) -> None:
        """Makes Serve's applications those of `serve_config`; the ones that are unchanged run on.

        An application that is just being deleted is awaited first: Serve 2.60 would forget that it is wanted again.
        """
        deadline = time.monotonic() + DELETION_S
        wanted = {application["name"] for application in serve_config["applications"]}
        while leaving := sorted(wanted & self.leaving()):
            if time.monotonic() > deadline:
                raise ClusterError(f"application {leaving[0]} is still being deleted after {DELETION_S:.0f} s")
            time.sleep(0.5)
        self._request("PUT", APPLICATIONS, json=serve_config, timeout_s=120)

    def leaving(self) -> set[str]:
        """Applications that are being deleted."""
        found = self.details().get("applications", {})
        return {name for name, one in found.items() if one.get("status") == DELETING}

    def delete_all(self) -> None:
        """Stops all applications and Serve itself; returns when they have ended."""
        self._request("DELETE", APPLICATIONS, timeout_s=120)

    def nodes(self) -> list[dict[str, float]]:
        """Total resources of each live node."""
        answer = self._request("GET", NODES, params={"detail": "true"}).json()
        nodes = ((answer.get("data") or {}).get("result") or {}).get("result") or []
        return [node["resources_total"] for node in nodes if node["state"] == "ALIVE" and node["resources_total"]]

    def _request(
        self,
        method: str,
        path: str,
        *,
        json: dict[str, Any] | None = None,
        params: dict[str, str] | None = None,
        timeout_s: float = 10,
    ) -> httpx.Response:
        try:
            with httpx.Client(trust_env=False, timeout=timeout_s, headers=self._headers) as client:
                answer = client.request(method, self._address + path, json=json, params=params)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            what = str(error).strip() or type(error).__name__
            raise DashboardSilent(f"Ray's dashboard at {self._address} does not answer: {what}") from None
        if answer.is_error:
            raise ClusterError(f"Ray's dashboard refused {method} {path}: {answer.status_code} {meaning(answer.text)}")
        return answer


def meaning(message: str) -> str:
    """The last line of a traceback or message that says what happened."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", message)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Mismatch|Exit)\b.*:", line)]
    return (raised or lines or [""])[-1]
