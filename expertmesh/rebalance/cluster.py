"""What a rebalance needs of a cluster, whatever runs it: the seam to Ray Serve's REST API or to Kubernetes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from expertmesh.config import GroupSection
from expertmesh.resources import NodeResources
from expertmesh.v1 import directory_pb2


@dataclass(frozen=True)
class GroupState:
    """One group on its way up or down."""

    ready: bool
    """It runs, and all of its running replicas are ready in the directory."""
    running: int
    detail: str
    """For people, on one line."""
    error: str = ""
    """One line where it has failed."""
    leaving: bool = False
    """It was removed and is not gone yet."""


class Cluster(Protocol):
    """Every method raises ClusterError where the cluster does not answer."""

    def groups(self) -> Mapping[str, GroupState]:
        """Every group that is deployed or not gone yet."""

    def apply(self, groups: Sequence[GroupSection]) -> None:
        """Makes the cluster's groups these, and returns without waiting for them. Those of the same content run on;
        one that is just leaving is awaited first where it is to come back."""

    def table(self) -> directory_pb2.Table: ...

    def nodes(self) -> Sequence[NodeResources] | None:
        """Total resources of each node; None where nodes come on demand."""
