from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.directory.directory import HEARTBEAT_S, LOADS_INTERVAL_S, due
from expertmesh.directory.registry import DEFAULT_LEASE_S, Registry
from expertmesh.directory.table import merge
from expertmesh.errors import WireError
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import expert_pb2


def replica(name: str, state: int = expert_pb2.REPLICA_STATE_READY, queued_rows: int = 0) -> pb.Replica:
    return pb.Replica(
        replica_id=name,
        group="g",
        address="127.0.0.1:1",
        fingerprint="f",
        state=expert_pb2.ReplicaState.ValueType(state),
        load=expert_pb2.Load(queued_rows=queued_rows),
    )


def names(table: pb.Table) -> list[str]:
    return [entry.replica_id for entry in table.replicas]


def test_a_replica_is_known_until_its_lease_has_run_out() -> None:
    registry = Registry("d", now=0)
    registry.announce(replica("a"), 1000, now=0)
    registry.announce(replica("b"), 1000, now=0.5)
    assert names(registry.table(0.99)) == ["a", "b"]
    version = registry.version
    assert names(registry.table(1.0)) == ["b"]
    assert registry.version == version + 1
    registry.announce(replica("b"), 1000, now=1.4)
    assert names(registry.table(2.3)) == ["b"]


def test_the_version_rises_with_membership_and_state_but_not_with_load() -> None:
    registry = Registry("d", now=0)
    versions = [registry.version]
    for entry in [replica("a"), replica("a", queued_rows=5), replica("a", expert_pb2.REPLICA_STATE_DRAINING)]:
        registry.announce(entry, 1000, now=0)
        versions.append(registry.version)
    assert versions[1] > versions[0] and versions[2] == versions[1] and versions[3] > versions[2]
    assert registry.loads_revision == 1
    registry.withdraw("a")
    assert registry.version > versions[3]
    last = registry.version
    registry.withdraw("a")
    assert registry.version == last


def test_settling_lasts_for_the_longest_lease_announced() -> None:
    registry = Registry("d", now=10)
    assert registry.table(10).settling
    assert not registry.table(10 + DEFAULT_LEASE_S).settling
    registry = Registry("d", now=10)
    registry.announce(replica("a"), 8000, now=11)
    assert registry.table(17.9).settling
    assert not registry.table(18).settling
    registry.announce(replica("b"), 60_000, now=18)
    assert not registry.table(18.1).settling


def test_watchers_hear_of_membership_at_once_and_of_loads_once_a_second() -> None:
    registry, now = Registry("d", now=0), 2 * DEFAULT_LEASE_S
    registry.announce(replica("a"), 60_000, now)
    sent, loads = registry.table(now), registry.loads_revision
    assert not due(registry, sent, loads, sent_at=now, now=now + LOADS_INTERVAL_S)
    assert due(registry, sent, loads, sent_at=now, now=now + HEARTBEAT_S)
    registry.announce(replica("a", queued_rows=1), 60_000, now)
    assert not due(registry, sent, loads, sent_at=now, now=now + 0.9 * LOADS_INTERVAL_S)
    assert due(registry, sent, loads, sent_at=now, now=now + LOADS_INTERVAL_S)
    registry.announce(replica("b"), 1000, now)
    assert due(registry, sent, loads, sent_at=now, now=now)
    sent, loads = registry.table(now), registry.loads_revision
    assert due(registry, sent, loads, sent_at=now, now=now + 1), "b's lease has run out"


def test_watchers_hear_at_once_that_the_directory_has_settled() -> None:
    registry = Registry("d", now=0)
    sent = registry.table(2.9)
    assert not due(registry, sent, 0, sent_at=2.9, now=2.95)
    assert due(registry, sent, 0, sent_at=2.9, now=3.0)


@pytest.mark.parametrize(
    ("entry", "lease_ms", "wrong"),
    [
        (pb.Replica(), 1000, "replica_id is empty"),
        (pb.Replica(replica_id="a", group="g", fingerprint="f"), 1000, "address is empty"),
        (replica("a", expert_pb2.REPLICA_STATE_UNSPECIFIED), 1000, "state is unspecified"),
        (replica("a"), 0, "lease_ms 0"),
    ],
)
def test_entries_of_no_use_are_refused(entry: pb.Replica, lease_ms: int, wrong: str) -> None:
    registry = Registry("d", now=0)
    with pytest.raises(WireError, match=wrong):
        registry.announce(entry, lease_ms, now=0)
    assert not registry.table(0).replicas


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 20), st.integers(0, 15)), max_size=30))
def test_the_table_holds_exactly_the_leases_that_run(steps: list[tuple[str, int, int]]) -> None:
    registry, now, ends = Registry("d", now=0), 0.0, {}
    for name, lease, pause in steps:
        now += pause
        registry.announce(replica(name), lease * 1000, now)
        ends[name] = now + lease
        assert names(registry.table(now)) == sorted(n for n, end in ends.items() if end > now)
        running = [end for end in ends.values() if end > now]
        assert registry.next_change_at(now) <= min(running)


def table(directory: str, settling: bool, *entries: pb.Replica) -> pb.Table:
    return pb.Table(directory_id=directory, version=1, settling=settling, replicas=entries)


def test_a_settled_table_stands_as_it_is() -> None:
    received = table("new", False, replica("b"))
    assert merge(table("old", False, replica("a")), received) == received
    assert merge(None, received) == received


def test_while_a_directory_settles_replicas_known_before_stay() -> None:
    before = table("old", False, replica("a"), replica("b", queued_rows=1))
    merged = merge(before, table("new", True, replica("b", queued_rows=9)))
    assert sorted(names(merged)) == ["a", "b"]
    assert {entry.replica_id: entry.load.queued_rows for entry in merged.replicas}["b"] == 9
    assert merged.settling and merged.directory_id == "new"
    again = merge(merged, table("new", True, replica("b"), replica("c")))
    assert sorted(names(again)) == ["a", "b", "c"]
    assert names(merge(again, table("new", False, replica("c")))) == ["c"]


def test_entries_that_would_take_too_much_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("d", now=0)
    for field in ("replica_id", "group", "address", "fingerprint", "node_id"):
        long = replica("a")
        setattr(long, field, "x" * 501)
        with pytest.raises(WireError, match=f"^announcement: {field} has more than 500 characters$"):
            registry.announce(long, 1000, now=0)
    large = replica("a")
    large.layers.add(experts=range(2**20))
    with pytest.raises(WireError, match=r"^announcement of a: its experts take"):
        registry.announce(large, 1000, now=0)
    large.layers[0].experts[:] = range(131_072)
    registry.announce(large, 1000, now=0)
    monkeypatch.setattr("expertmesh.directory.registry.MAX_COST", 9 * 2**20)
    small = replica("small")
    registry.announce(small, 1000, now=0)
    other = pb.Replica()
    other.CopyFrom(large)
    other.replica_id, other.group = "b", "h"
    with pytest.raises(WireError, match=r"^announcement of b: the table is full, with 2 replicas$"):
        registry.announce(other, 1000, now=0)
    registry.announce(large, 2000, now=0.5)
    assert names(registry.table(1.2)) == ["a"]
    registry.announce(other, 60_000, now=3)
    assert names(registry.table(3)) == ["b"] and set(registry.holders(0, [5])) == {"h"}


def test_nothing_but_the_entry_is_kept_of_what_was_received() -> None:
    known, unknown = replica("a").SerializeToString(), b"\x9a\x06\x03abc"
    registry = Registry("d", now=0)
    registry.announce(pb.Replica.FromString(known + unknown), 1000, now=0)
    assert registry.table(0).replicas[0].SerializeToString() == known
