"""The controller's view of a cluster that the command line knows: observed loads from the directory, the planner."""

from __future__ import annotations

import time
from dataclasses import replace

from expertmesh.cluster import record
from expertmesh.cluster.record import Record
from expertmesh.directory.client import expert_load, list_table
from expertmesh.placement.capacity import Capacity, observed_capacity
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
BUSY_WINDOW_S, BUSY_LOOKS = 10.0, 4


class ControlledCluster:
    """A Subject. Raises ClusterError, ConfigError or ArtifactError as `LocalCluster` does."""

    def __init__(self, running: Record, show: Show, patience: Patience, cluster: Cluster | None = None) -> None:
        """`cluster` instead of Ray Serve's."""
        self._running = running
        self._local = LocalCluster(running, show, patience, cluster)

    def loads(self, window_s: float) -> directory_pb2.ExpertLoadReply:
        return expert_load(self._running.directory, window_s)

    def planned(self, loads: directory_pb2.ExpertLoadReply) -> Planned:
        return plan_for(loads, self._local.config, self._local.manifest, self._capacity())

    def _capacity(self) -> Capacity | None:
        """Rows/s that one replica sustains, from a few looks at how busy the replicas are."""
        directory, tables = self._running.directory, []
        for number in range(BUSY_LOOKS):
            time.sleep(1.0 if number else 0.0)
            tables.append(list_table(directory))
        recent = expert_load(directory, BUSY_WINDOW_S)
        return observed_capacity(sum(sum(layer.rows) for layer in recent.layers), recent.window_s, tables)

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
