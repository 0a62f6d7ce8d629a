"""The directory's state: leases of replicas, and the table made of them. Times are seconds of a monotonic clock."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from expertmesh.errors import WireError
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import expert_pb2

DEFAULT_LEASE_S = 3.0
MAX_LEASE_MS = 600_000
MAX_GROUPS = 10_000
MAX_TEXT = 500
"""Characters of a name, an address or a fingerprint."""
MAX_ENTRY_COST = 8 * 2**20
"""Bytes of memory, estimated; 131,072 experts fit."""
MAX_COST = 2**30
"""Of all entries; some 2,800 replicas with 61 layers of 256 experts each, or 50,000 with 8 experts in each layer."""


@dataclass
class Lease:
    replica: pb.Replica
    expires_at: float
    cost: int


class Registry:
    """Who announced itself and when it will be forgotten.

    Of groups that have no replica any more it remembers the experts. Settling lasts one lease period from the start:
    the longest lease announced so far, at least `DEFAULT_LEASE_S`.
    """

    def __init__(self, directory_id: str, now: float, left: Callable[[str], None] = lambda replica_id: None) -> None:
        """`left` is called with the id of every replica that is forgotten."""
        self.directory_id = directory_id
        self.version = 1
        self.loads_revision = 0
        """Rises with every announcement whose load differs from the one before."""
        self._left = left
        self._leases: dict[str, Lease] = {}
        self._cost = 0
        """Of all leases."""
        self._layers: dict[str, tuple[expert_pb2.LayerExperts, ...]] = {}
        """Group -> its experts as last announced, also where it has no replica now; the longest known first."""
        self._costs: dict[str, int] = {}
        """Of `_layers`."""
        self._started_at = now
        self._longest_lease_s = DEFAULT_LEASE_S

    def announce(self, replica: pb.Replica, lease_ms: int, now: float) -> None:
        """Adds the replica or renews its lease; raises WireError where an entry nobody could use is announced, or one
        too many."""
        cost = _check(replica, lease_ms)
        self.expire(now)
        before = self._leases.get(replica.replica_id)
        others = self._cost - (before.cost if before else 0)
        if others + cost > MAX_COST:
            raise WireError(
                f"announcement of {replica.replica_id}: the table is full, with {len(self._leases)} replicas"
            )
        replica, self._cost = _copy(replica), others + cost
        self._leases[replica.replica_id] = Lease(replica, now + lease_ms / 1000, cost)
        if self.settling(now):
            self._longest_lease_s = max(self._longest_lease_s, lease_ms / 1000)
        if before is None or before.replica.layers != replica.layers or replica.group not in self._layers:
            self._remember(replica, cost)
        if before is None or _membership(before.replica) != _membership(replica):
            self.version += 1
        elif (before.replica.load, before.replica.queue_wait) != (replica.load, replica.queue_wait):
            self.loads_revision += 1

    def withdraw(self, replica_id: str) -> None:
        """Forgets the replica at once; nothing happens where it is not known."""
        lease = self._leases.pop(replica_id, None)
        if lease is not None:
            self._cost -= lease.cost
            self.version += 1
            self._left(replica_id)

    def expire(self, now: float) -> None:
        """Forgets the replicas whose lease has run out."""
        for replica_id in [name for name, lease in self._leases.items() if lease.expires_at <= now]:
            self.withdraw(replica_id)

    def replicas(self) -> Iterable[pb.Replica]:
        return (lease.replica for lease in self._leases.values())

    def groups(self) -> set[str]:
        """Those with a replica that takes rows or will."""
        return {one.group for one in self.replicas() if one.state != expert_pb2.REPLICA_STATE_DRAINING}

    def holders(self, layer: int, experts: Collection[int]) -> dict[str, set[int]]:
        """Group -> those of the experts that it holds, with or without a replica."""
        wanted = set(experts)
        found = {
            group: {expert for one in layers if one.layer == layer for expert in one.experts if expert in wanted}
            for group, layers in self._layers.items()
        }
        return {group: held for group, held in found.items() if held}

    def forget(self, group: str) -> None:
        """The group has been removed, so that it cannot be woken."""
        if group not in self.groups():
            self._drop(group)

    def settling(self, now: float) -> bool:
        return now < self._started_at + self._longest_lease_s

    def next_change_at(self, now: float) -> float:
        """When the table changes by itself unless something is announced; infinite if never."""
        ends = [lease.expires_at for lease in self._leases.values()]
        if self.settling(now):
            ends.append(self._started_at + self._longest_lease_s)
        return min(ends, default=float("inf"))

    def _remember(self, replica: pb.Replica, cost: int) -> None:
        self._drop(replica.group)
        self._layers[replica.group], self._costs[replica.group] = tuple(replica.layers), cost
        while len(self._layers) > MAX_GROUPS or sum(self._costs.values()) > MAX_COST:
            self._drop(next(iter(self._layers)))

    def _drop(self, group: str) -> None:
        self._layers.pop(group, None)
        self._costs.pop(group, None)

    def table(self, now: float) -> pb.Table:
        self.expire(now)
        return pb.Table(
            directory_id=self.directory_id,
            version=self.version,
            settling=self.settling(now),
            replicas=[self._leases[replica_id].replica for replica_id in sorted(self._leases)],
        )


def _membership(replica: pb.Replica) -> bytes:
    """All of an entry but its load."""
    bare = pb.Replica()
    bare.CopyFrom(replica)
    bare.ClearField("load")
    bare.ClearField("queue_wait")
    return bare.SerializeToString(deterministic=True)


def _copy(replica: pb.Replica) -> pb.Replica:
    """The entry alone: a part of a message keeps all that was received with it in memory."""
    copy = pb.Replica()
    copy.CopyFrom(replica)
    return copy


def _cost(replica: pb.Replica) -> int:
    """Bytes of memory that it takes at most, with its counters in `ExpertLoads`."""
    return 1024 + 256 * len(replica.layers) + 16 * replica.ByteSize()


def _check(replica: pb.Replica, lease_ms: int) -> int:
    """The entry's cost."""
    replica.DiscardUnknownFields()
    for field in ("replica_id", "group", "address", "fingerprint"):
        if not getattr(replica, field):
            raise WireError(f"announcement: {field} is empty")
    for field in ("replica_id", "group", "address", "fingerprint", "node_id"):
        if len(getattr(replica, field)) > MAX_TEXT:
            raise WireError(f"announcement: {field} has more than {MAX_TEXT} characters")
    if replica.state == expert_pb2.REPLICA_STATE_UNSPECIFIED:
        raise WireError(f"announcement of {replica.replica_id}: state is unspecified")
    if not 0 < lease_ms <= MAX_LEASE_MS:
        raise WireError(f"announcement of {replica.replica_id}: lease_ms {lease_ms} is not within 1 to {MAX_LEASE_MS}")
    cost = _cost(replica)
    if cost > MAX_ENTRY_COST:
        raise WireError(f"announcement of {replica.replica_id}: its experts take {cost} bytes or so, too many")
    return cost
