"""Small changes of a division, layer by layer: swaps that even out loads, swaps for pairs of experts, second homes."""

from __future__ import annotations

from typing import Literal

import numpy

from expertmesh.placement.arrays import Floats
from expertmesh.placement.division import Held

Objective = Literal["spread", "gather"]
"""spread: experts that fire together in different groups, for balance; gather: in one, for fewer messages per token."""
BALANCE_SWAPS, PAIR_SWAPS = 48, 48
"""Per layer at most."""
SLACK = 1.02
"""Swaps for pairs may raise the largest load per replica of a layer by so much."""


def even_out(held: Held, loads: Floats, replicas: Floats) -> None:
    """Changes held [G, E] of one layer in place: two experts change places between the group with the most load per
    replica and another as long as that lowers the larger of both. Every expert must have one group."""
    owner = held.argmax(axis=0)
    sums = held @ loads
    for _ in range(BALANCE_SWAPS):
        fullest = int((sums / replicas).argmax())
        inside, outside = numpy.flatnonzero(owner == fullest), numpy.flatnonzero(owner != fullest)
        if not len(inside) or not len(outside):
            return
        moved = loads[inside][:, None] - loads[outside][None, :]
        to = owner[outside]
        peaks = numpy.maximum((sums[fullest] - moved) / replicas[fullest], (sums[to] + moved) / replicas[to])
        one, other = numpy.unravel_index(int(peaks.argmin()), peaks.shape)
        if peaks[one, other] >= sums[fullest] / replicas[fullest] * (1 - 1e-9):
            return
        _exchange(held, owner, int(inside[one]), int(outside[other]))
        sums = held @ loads


def place_pairs(held: Held, loads: Floats, replicas: Floats, pairs: Floats, objective: Objective) -> None:
    """Changes held [G, E] of one layer in place by swaps after which experts that fire together (pairs [E, E]) share a
    group less often, or more often; loads stay as even as they are, up to SLACK. Every expert must have one group."""
    wanted = pairs if objective == "spread" else -pairs
    owner = held.argmax(axis=0)
    sums = held @ loads
    bound = (sums / replicas).max() * SLACK * replicas
    moved = loads[:, None] - loads[None, :]
    for _ in range(PAIR_SWAPS):
        together = wanted @ held.T
        own = together[numpy.arange(len(owner)), owner]
        there = together[:, owner]
        change = there + there.T - own[:, None] - own[None, :] - 2 * wanted
        allowed = owner[:, None] != owner[None, :]
        allowed &= (sums[owner][:, None] - moved <= bound[owner][:, None]) & (
            sums[owner][None, :] + moved <= bound[owner][None, :]
        )
        change = numpy.where(allowed, change, 0.0)
        one, other = numpy.unravel_index(int(change.argmin()), change.shape)
        if change[one, other] >= -1e-12:
            return
        _exchange(held, owner, int(one), int(other))
        sums = held @ loads


def add_homes(held: Held, loads: Floats, replicas: Floats, largest: int, most: int) -> None:
    """Changes held [G, E] of one layer in place: up to `most` experts of the fullest group get a second home in the
    emptiest one that holds fewer than `largest`, as long as their load is more than its replicas have."""
    served = held * loads
    for _ in range(most):
        sums = served.sum(axis=1)
        fullest = int((sums / replicas).argmax())
        expert = int(served[fullest].argmax())
        room = (held.sum(axis=1) < largest) & ~held[:, expert]
        if not room.any() or not served[fullest, expert]:
            return
        emptiest = int(numpy.where(room, sums / replicas, numpy.inf).argmin())
        level = (sums[fullest] + sums[emptiest]) / (replicas[fullest] + replicas[emptiest])
        moved = min(served[fullest, expert], sums[fullest] - level * replicas[fullest])
        if moved <= 0.01 * sums[fullest]:
            return
        held[emptiest, expert] = True
        served[fullest, expert] -= moved
        served[emptiest, expert] += moved


def _exchange(held: Held, owner: numpy.typing.NDArray[numpy.intp], one: int, other: int) -> None:
    first, second = owner[one], owner[other]
    held[first, one] = held[second, other] = False
    held[first, other] = held[second, one] = True
    owner[one], owner[other] = second, first
