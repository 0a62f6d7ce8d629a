from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router_service.dispatch.choice import MESSAGE_ROWS, Candidate, choose_replicas


def candidate(name: str, experts: set[int], rows: int = 0) -> Candidate:
    return Candidate(name, frozenset(experts), rows)


def test_the_least_loaded_of_those_that_cover() -> None:
    both = [candidate("busy", {0, 1}, rows=50), candidate("idle", {0, 1}, rows=1)]
    assert choose_replicas({0: 3, 1: 2}, both)[0] == {0: "idle", 1: "idle"}


def test_few_messages_where_loads_are_alike() -> None:
    replicas = [candidate("all", {0, 1, 2, 3}), candidate("left", {0, 1}), candidate("right", {2, 3})]
    owners, _ = choose_replicas(dict.fromkeys(range(4), 1), replicas)
    assert len(set(owners.values())) == 1


def test_a_second_message_where_the_first_replica_is_much_busier() -> None:
    replicas = [candidate("all", {0, 1}, rows=10 * MESSAGE_ROWS), candidate("hot", {0})]
    assert choose_replicas({0: 1, 1: 1}, replicas)[0] == {0: "hot", 1: "all"}


def test_equally_loaded_replicas_take_turns() -> None:
    replicas = [Candidate("a", frozenset({0}), rows=0, sent=9), Candidate("b", frozenset({0}), rows=0, sent=8)]
    assert choose_replicas({0: 1}, replicas)[0] == {0: "b"}


def test_what_nobody_serves_is_reported() -> None:
    owners, missing = choose_replicas({0: 1, 7: 1}, [candidate("a", {0})])
    assert owners == {0: "a"}
    assert missing == {7}
    assert choose_replicas({}, []) == ({}, frozenset())


@given(
    st.dictionaries(st.integers(0, 7), st.integers(1, 20)),
    st.lists(st.tuples(st.frozensets(st.integers(0, 7)), st.integers(0, 30)), max_size=6),
)
def test_every_expert_goes_to_one_that_has_it(counts: dict[int, int], made: list[tuple[frozenset[int], int]]) -> None:
    replicas = [Candidate(f"r{number}", experts, rows) for number, (experts, rows) in enumerate(made)]
    owners, missing = choose_replicas(counts, replicas)
    assert owners.keys() | missing == counts.keys()
    assert not owners.keys() & missing
    assert all(expert in replicas[int(name[1:])].experts for expert, name in owners.items())
    assert all(expert not in one.experts for expert in missing for one in replicas)
    assert choose_replicas(counts, reversed(replicas)) == (owners, missing)
