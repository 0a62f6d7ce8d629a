"""The native choice of replicas gives what the Python one gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from marks import native_core

from router_service.dispatch.choice import Candidate, choose_replicas

native = native_core()

CANDIDATES = st.lists(st.tuples(st.frozensets(st.integers(0, 9)), st.integers(0, 30), st.integers(0, 3)), max_size=8)


@given(st.dictionaries(st.integers(0, 12), st.integers(1, 20)), CANDIDATES)
def test_the_same_owners_and_the_same_experts_without_one(
    counts: dict[int, int], made: list[tuple[frozenset[int], int, int]]
) -> None:
    candidates = [Candidate(f"r{number}", *values) for number, values in enumerate(made)]
    expected, missing = choose_replicas(counts, candidates)
    columns = [(sorted(one.experts), one.rows, one.sent) for one in candidates]
    owners = dict(zip(sorted(counts), native.choose_owners(sorted(counts.items()), columns), strict=True))
    assert {expert for expert, owner in owners.items() if owner < 0} == missing
    assert {expert: candidates[owner].replica for expert, owner in owners.items() if owner >= 0} == expected
