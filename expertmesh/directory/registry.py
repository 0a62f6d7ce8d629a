"""The directory's state: leases of replicas, and the table made of them. Times are seconds of a monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.errors import WireError
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import expert_pb2

DEFAULT_LEASE_S = 3.0
MAX_LEASE_MS = 600_000


@dataclass
class Lease:
    replica: pb.Replica
    expires_at: float


class Registry:
    """Who announced itself and when it will be forgotten.

    Settling lasts one lease period from the start: the longest lease announced so far, at least `DEFAULT_LEASE_S`.
    """

    def __init__(self, directory_id: str, now: float) -> None:
        self.directory_id = directory_id
        self.version = 1
        self.loads_revision = 0
        """Rises with every announcement whose load differs from the one before."""
        self._leases: dict[str, Lease] = {}
        self._started_at = now
        self._longest_lease_s = DEFAULT_LEASE_S

    def announce(self, replica: pb.Replica, lease_ms: int, now: float) -> None:
        """Adds the replica or renews its lease; raises WireError where an entry nobody could use is announced."""
        _check(replica, lease_ms)
        self.expire(now)
        before = self._leases.get(replica.replica_id)
        self._leases[replica.replica_id] = Lease(replica, now + lease_ms / 1000)
        if self.settling(now):
            self._longest_lease_s = max(self._longest_lease_s, lease_ms / 1000)
        if before is None or _membership(before.replica) != _membership(replica):
            self.version += 1
        elif before.replica.load != replica.load:
            self.loads_revision += 1

    def withdraw(self, replica_id: str) -> None:
        """Forgets the replica at once; nothing happens where it is not known."""
        if self._leases.pop(replica_id, None) is not None:
            self.version += 1

    def expire(self, now: float) -> None:
        """Forgets the replicas whose lease has run out."""
        for replica_id in [name for name, lease in self._leases.items() if lease.expires_at <= now]:
            self.withdraw(replica_id)

    def settling(self, now: float) -> bool:
        return now < self._started_at + self._longest_lease_s

    def next_change_at(self, now: float) -> float:
        """When the table changes by itself unless something is announced; infinite if never."""
        ends = [lease.expires_at for lease in self._leases.values()]
        if self.settling(now):
            ends.append(self._started_at + self._longest_lease_s)
        return min(ends, default=float("inf"))

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
    return bare.SerializeToString(deterministic=True)


def _check(replica: pb.Replica, lease_ms: int) -> None:
    for field in ("replica_id", "group", "address", "fingerprint"):
        if not getattr(replica, field):
            raise WireError(f"announcement: {field} is empty")
    if replica.state == expert_pb2.REPLICA_STATE_UNSPECIFIED:
        raise WireError(f"announcement of {replica.replica_id}: state is unspecified")
    if not 0 < lease_ms <= MAX_LEASE_MS:
        raise WireError(f"announcement of {replica.replica_id}: lease_ms {lease_ms} is not within 1 to {MAX_LEASE_MS}")
