"""A cluster of replicas in this process, over real gRPC and with a real directory, without Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mesh import group_args

from expert_service.executor import Pairs
from expert_service.replica import Replica
from expertmesh.artifact.manifest import read_manifest
from expertmesh.config import ClusterConfig, GroupSection
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError
from expertmesh.experts import format_indices
from expertmesh.rebalance.cluster import GroupState
from expertmesh.resources import NodeResources
from expertmesh.v1 import directory_pb2

LEASE_MS = 600
DRAIN_S = 5.0


class Liar:
    """An executor that answers with other numbers than its experts'."""

    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        return hidden_states * 2


@dataclass
class MeshCluster:
    artifact: Path
    directory: str
    cpus: float = 64
    broken: set[str] = field(default_factory=set)
    """Groups that never start."""
    liars: set[str] = field(default_factory=set)
    replicas: dict[str, list[Replica]] = field(default_factory=dict)
    leaving: dict[str, threading.Thread] = field(default_factory=dict)
    applied: list[tuple[str, ...]] = field(default_factory=list)
    """Names of the groups, each time that they were applied."""
    most: float = 0
    """CPUs that were taken together at most."""

    def groups(self) -> Mapping[str, GroupState]:
        self.leaving = {name: thread for name, thread in self.leaving.items() if thread.is_alive()}
        listed = {one.replica_id for one in self.table().replicas}
        found = {
            name: GroupState(
                ready=bool(running) and {one.replica_id for one in running} <= listed,
                running=len(running),
                detail="here",
            )
            for name, running in self.replicas.items()
        }
        return {name: GroupState(False, 0, "leaving", leaving=True) for name in self.leaving} | found

    def apply(self, groups: Sequence[GroupSection]) -> None:
        names = {group.name for group in groups}
        for name in names & set(self.leaving):
            self.leaving[name].join()
        for name in set(self.replicas) - names:
            self.leaving[name] = threading.Thread(target=_end, args=(self.replicas.pop(name),))
            self.leaving[name].start()
        for group in groups:
            running = self.replicas.setdefault(group.name, [])
            while len(running) < group.min_replicas and group.name not in self.broken:
                running.append(self._start(group))
        self.applied.append(tuple(sorted(names)))
        self.most = max(self.most, sum(group.num_cpus * group.min_replicas for group in groups))

    def table(self) -> directory_pb2.Table:
        return list_table(self.directory)

    def nodes(self) -> Sequence[NodeResources] | None:
        return [{"CPU": self.cpus}]

    def close(self) -> None:
        self.apply(())
        for thread in self.leaving.values():
            thread.join()

    def _start(self, group: GroupSection) -> Replica:
        held = group.expert_sets(read_manifest(self.artifact))
        layers = {layer: format_indices(experts) for layer, experts in held.items()}
        args = group_args(self.artifact, self.directory, group.name, {0}, lease_ms=LEASE_MS)
        args = args.model_copy(update={"experts": layers})
        return Replica(args, self.directory, executor=Liar() if group.name in self.liars else None)


def _end(replicas: list[Replica]) -> None:
    for replica in replicas:
        replica.drain(DRAIN_S)
        replica.stop()


@dataclass
class Silent:
    """A cluster that does not answer the next `times` times."""

    inner: MeshCluster
    times: int

    def _fail(self) -> None:
        self.times -= 1
        if self.times >= 0:
            raise ClusterError("does not answer")

    def groups(self) -> Mapping[str, GroupState]:
        self._fail()
        return self.inner.groups()

    def apply(self, groups: Sequence[GroupSection]) -> None:
        self._fail()
        self.inner.apply(groups)

    def table(self) -> directory_pb2.Table:
        self._fail()
        return self.inner.table()

    def nodes(self) -> Sequence[NodeResources] | None:
        return self.inner.nodes()


def config_for(artifact: Path, groups: Mapping[str, str], **more: object) -> ClusterConfig:
    """Groups of one CPU, name -> experts."""
    sections = [{"name": name, "experts": experts} for name, experts in groups.items()]
    values = {"name": "mesh", "model": {"artifact": artifact}, "groups": sections} | more
    return ClusterConfig.model_validate(values)


Say = Callable[[str], None]
