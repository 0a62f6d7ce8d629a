"""The groups as Ray Serve runs them: which have replicas, and how one that has none is woken.

Serve starts a replica of an application without any as soon as a call waits for it, whatever its policy says; ours is
`wake`, which does nothing. What blocks runs on threads.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from expertmesh.args import experts_application
from expertmesh.errors import ClusterError

PRESENT = ("STARTING", "UPDATING", "RECOVERING", "RUNNING")
"""States of replicas that serve or will."""


class ServeGroups:
    """An `Applications` for use in a process of Ray Serve."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}

    async def wake(self, group: str) -> None:
        try:
            # each handle that was called once keeps a router of its own
            handle = self._handles.setdefault(group, await asyncio.to_thread(_handle, group))
            await handle.wake.remote()
        except (RayServeException, RayError) as error:
            self._handles.pop(group, None)
            raise ClusterError(_first_line(error)) from None

    async def replicas(self) -> dict[str, int]:
        try:
            return await asyncio.to_thread(_replicas)
        except (RayServeException, RayError) as error:
            raise ClusterError(_first_line(error)) from None


def _handle(group: str) -> Any:
    """Raises RayServeException where there is no such application."""
    return serve.get_app_handle(experts_application(group))


def _replicas() -> dict[str, int]:
    prefix = experts_application("")
    return {
        name.removeprefix(prefix): sum(
            count
            for deployment in application.deployments.values()
            for state, count in deployment.replica_states.items()
            if state in PRESENT
        )
        for name, application in serve.status().applications.items()
        if name.startswith(prefix) and application.status != "DELETING"
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
