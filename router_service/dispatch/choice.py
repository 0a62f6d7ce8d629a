"""Which replica serves which expert: a pure function of loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MESSAGE_ROWS = 4
"""What one more message costs, in rows: a replica that gets none yet is taken only if it is this much less loaded."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could serve some experts of the layer in question."""

    replica: str
    experts: frozenset[int]
    rows: int
    """Rows that wait there or are under way to it."""
    sent: int = 0
    """Rows that this router has sent there so far: where loads are equal, they go where fewest went."""


def choose_replicas(
    counts: Mapping[int, int], candidates: Iterable[Candidate]
) -> tuple[dict[int, str], frozenset[int]]:
    """Assigns each expert that has rows to a replica: (expert -> replica, experts that nobody serves).

    Greedy: experts with the fewest candidates first, then those with most rows; each goes to the candidate with the
    least load, where the load counts what this call has assigned already, and a replica without a message so far costs
    MESSAGE_ROWS more. Equal candidates take turns by what they were sent before, then by name: the same input gives
    the same result.
    """
    candidates = list(candidates)
    covering = {expert: [one for one in candidates if expert in one.experts] for expert in counts}
    load = {one.replica: one.rows for one in candidates}
    used: set[str] = set()
    owners: dict[int, str] = {}
    for expert in sorted(counts, key=lambda expert: (len(covering[expert]), -counts[expert], expert)):
        if not covering[expert]:
            continue
        best = min(
            (load[one.replica] + (0 if one.replica in used else MESSAGE_ROWS), one.sent, one.replica)
            for one in covering[expert]
        )[-1]
        owners[expert] = best
        used.add(best)
        load[best] += counts[expert]
    return owners, frozenset(counts) - owners.keys()
