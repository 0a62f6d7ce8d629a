"""A cluster that `expertmesh up` started or attached to, changed through Ray's REST API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expertmesh.args import experts_application
from expertmesh.artifact.manifest import Manifest
from expertmesh.cluster.readiness import steps
from expertmesh.cluster.record import Record
from expertmesh.cluster.serve_api import DELETING, Details, ServeApi
from expertmesh.config import ClusterConfig, GroupSection
from expertmesh.deployment import serve_config
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError
from expertmesh.rebalance.cluster import GroupState
from expertmesh.resources import NodeResources
from expertmesh.v1 import directory_pb2


class ServeCluster:
    """`config` is what runs: all of it but its groups stays."""

    def __init__(self, running: Record, config: ClusterConfig, manifest: Manifest) -> None:
        self._config = config
        self._manifest = manifest
        self._running = running
        self._api = ServeApi(running.dashboard, running.token)

    def groups(self) -> Mapping[str, GroupState]:
        details = self._api.details()
        try:
            table = list_table(self._running.directory, timeout_s=2, tls=self._running.tls)
        except ClusterError:
            table = None
        prefix = experts_application("")
        found = details.get("applications", {})
        names = {name: name.removeprefix(prefix) for name in found if name.startswith(prefix)}
        reached = steps(names, details, table)
        return {
            names[step.application]: GroupState(
                ready=step.done,
                running=_running(found[step.application]),
                detail=f"{step.status}, {step.detail}".rstrip(", "),
                error=step.error,
                leaving=step.status == DELETING,
            )
            for step in reached
        }

    def apply(self, groups: Sequence[GroupSection]) -> None:
        self._api.deploy(serve_config(self._config.model_copy(update={"groups": tuple(groups)}), self._manifest))

    def table(self) -> directory_pb2.Table:
        return list_table(self._running.directory, tls=self._running.tls)

    def nodes(self) -> Sequence[NodeResources] | None:
        return self._api.nodes()


def _running(application: Details) -> int:
    replicas = [one for deployment in application.get("deployments", {}).values() for one in deployment["replicas"]]
    return sum(one["state"] == "RUNNING" for one in replicas)
