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


def choose_replicas(
    counts: Mapping[int, int], candidates: Iterable[Candidate]
) -> tuple[dict[int, str], frozenset[int]]:
    """Assigns each expert that has rows to a replica: (expert -> replica, experts that nobody serves).

    Greedy: experts with the fewest candidates first, then those with most rows; each goes to the candidate with the
    least load, where the load counts what this call has assigned already, and a replica without a message so far costs
    MESSAGE_ROWS more. Equal candidates are told apart by name, so that the result is the same for the same input.
    """
    candidates = list(candidates)
    covering = {expert: [one for one in candidates if expert in one.experts] for expert in counts}
    load = {one.replica: one.rows for one in candidates}
    used: set[str] = set()
    owners: dict[int, str] = {}
    for expert in sorted(counts, key=lambda expert: (len(covering[expert]), -counts[expert], expert)):
        if not covering[expert]:
            continue
        names = (one.replica for one in covering[expert])
        best = min(names, key=lambda name: (load[name] + (0 if name in used else MESSAGE_ROWS), name))
        owners[expert] = best
        used.add(best)
        load[best] += counts[expert]
    return owners, frozenset(counts) - owners.keys()
