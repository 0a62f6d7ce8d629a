"""What consumers make of the tables they receive."""

from __future__ import annotations

from expertmesh.v1 import directory_pb2 as pb


def merge(previous: pb.Table | None, received: pb.Table) -> pb.Table:
    """The table to act on after `received`, where `previous` is the result for the one before it.

    A settled table stands as it is. While a directory settles, a replica that it does not know yet may well be alive:
    those of `previous` stay until it has settled, beside those that it knows.
    """
    if previous is None or not received.settling:
        return received
    known = {replica.replica_id for replica in received.replicas}
    merged = pb.Table()
    merged.CopyFrom(received)
    merged.replicas.extend(replica for replica in previous.replicas if replica.replica_id not in known)
    return merged
