"""The controller's view of a cluster that the command line knows: observed loads from the directory, the planner."""

from __future__ import annotations

from dataclasses import replace

from expertmesh.cluster import record
from expertmesh.cluster.record import Record
from expertmesh.directory.client import expert_load
from expertmesh.placement.plan import Plan
from expertmesh.rebalance.change import difference
from expertmesh.rebalance.cluster import Cluster
from expertmesh.rebalance.decision import Attempt
from expertmesh.rebalance.journal import JournalFile
from expertmesh.rebalance.local import LocalCluster
from expertmesh.rebalance.planning import plan_for
from expertmesh.rebalance.run import Patience, Show
from expertmesh.rebalance.watch import Planned
from expertmesh.v1 import directory_pb2

SOURCE = "expertmesh rebalance --watch"


class ControlledCluster:
    """A Subject. Raises ClusterError, ConfigError or ArtifactError as `LocalCluster` does."""

    def __init__(self, running: Record, show: Show, patience: Patience, cluster: Cluster | None = None) -> None:
        """`cluster` instead of Ray Serve's."""
        self._running = running
        self._local = LocalCluster(running, show, patience, cluster)

    def loads(self, window_s: float) -> directory_pb2.ExpertLoadReply:
        return expert_load(self._running.directory, window_s, tls=self._running.tls)

    def planned(self, loads: directory_pb2.ExpertLoadReply) -> Planned:
        return plan_for(loads, self._local.config, self._local.manifest)

    def groups_changed(self, plan: Plan) -> int:
        change = difference(self._local.config.groups, plan.groups, self._local.manifest)
        return len(change.added) + len(change.removed)

    def last(self) -> Attempt | None:
        journal = self._local.journals.last()
        if journal is None or journal.ended_at is None:
            return None
        return Attempt(journal.ended_at, succeeded=journal.direction == "forward")

    def apply(self, plan: Plan) -> bool:
        with JournalFile(record.state_dir(self._running.name)).lock():
            local = replace(self._local)  # as it is now
            local.check_idle()
            return local.apply(local.propose(plan, SOURCE)) == "done"
