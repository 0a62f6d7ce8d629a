"""Where to cut the experts, sorted from hot to cold, into groups: dynamic programming over the cuts.

Hot experts end in small groups, which are cheap to replicate, and cold ones in large groups that one replica serves,
since that is what costs least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy

from expertmesh.errors import ConfigError
from expertmesh.placement.arrays import Floats, Indices

MAX_GROUPS = 32
"""Where the planner chooses how many and memory does not ask for more."""
REPLICA_WEIGHT, BALANCE_WEIGHT, GROWTH_WEIGHT = 0.25, 0.2, 0.1
"""What else counts, beside memory x time as 1: replicas at all; loads that differ; what the next growth will cost."""
MAX_POLISH = 64
NEAR = 1.01
"""Of divisions that cost so nearly the same, the one with the fewest groups."""


@dataclass(frozen=True)
class Limits:
    """`capacity`: rows/s of one replica at its target; `largest`: experts per layer that its memory holds."""

    capacity: float
    largest: int
    max_replicas: int | None = None


def replicas_for(loads: Floats, capacity: float) -> Floats:
    """Replicas that bring each load to the target or below, one at least."""
    needed: Floats = numpy.maximum(1.0, numpy.ceil(loads / capacity - 1e-9))
    return needed


def cut(profile: Floats, limits: Limits, groups: int | None) -> tuple[int, ...]:
    """profile [E], rows/s of each rank over all layers, descending -> ranks at which groups begin, and E.

    The cheapest division into `groups` groups; without it, of any number that is worth its groups. Costs are, per
    group, its experts times its replicas, and the three weights above. Raises ConfigError where none is possible.
    """
    experts = len(profile)
    most = min(experts, max(MAX_GROUPS, math.ceil(experts / limits.largest))) if groups is None else groups
    if not 1 <= most <= experts:
        raise ConfigError(f"plan: {groups} groups cannot share {experts} experts per layer")
    costs = _segment_costs(profile, limits)
    best = numpy.full((most + 1, experts + 1), numpy.inf)
    best[0, 0] = 0.0
    begins = numpy.zeros((most + 1, experts + 1), dtype=int)
    for count in range(1, most + 1):
        totals = best[count - 1][:, None] + costs
        begins[count] = totals.argmin(axis=0)
        best[count] = totals.min(axis=0)
    totals_of_all = best[1:, experts] if groups is None else best[most:, experts]
    if not numpy.isfinite(totals_of_all).any():
        raise ConfigError(_why_impossible(profile, limits, most, groups))
    near = totals_of_all <= totals_of_all.min() * NEAR
    chosen = int(near.argmax()) + 1 if groups is None else most
    cuts = [experts]
    for count in range(chosen, 0, -1):
        cuts.append(int(begins[count, cuts[-1]]))
    return tuple(reversed(cuts))


def _segment_costs(profile: Floats, limits: Limits) -> Floats:
    """[E + 1, E + 1]: of a group with the ranks from row to column; infinite where it may not be."""
    sums = numpy.concatenate([[0.0], profile.cumsum()])
    rank = numpy.arange(len(sums))
    sizes = (rank[None, :] - rank[:, None]).astype(float)
    loads = numpy.maximum(sums[None, :] - sums[:, None], 0.0)
    return group_costs(sizes, loads, profile, limits)


def group_costs(sizes: Floats, loads: Floats, profile: Floats, limits: Limits) -> Floats:
    """Of groups with so many experts per layer and so much load, in any shape; infinite where one may not be."""
    experts, total = len(profile), profile.sum()
    replicas = replicas_for(loads, limits.capacity)
    least = max(1.0, total / limits.capacity)
    costs = sizes * replicas / experts
    costs += REPLICA_WEIGHT * replicas / least
    costs += BALANCE_WEIGHT * least * (loads / total) ** 2 / replicas
    costs += GROWTH_WEIGHT * sizes / experts * loads / total
    allowed = (sizes >= 1) & (sizes <= limits.largest)
    if limits.max_replicas is not None:
        allowed = allowed & (replicas <= limits.max_replicas)
    return numpy.where(allowed, costs, numpy.inf)


def polish(owner: Indices, profile: Floats, limits: Limits) -> Indices:
    """owner [E], the group of each rank, improved: one rank moves, or two change places, while that costs less.

    Replicas are whole, so that a division along the ranks may leave groups just above a number of them.
    """
    owner = owner.copy()
    ranks, groups = numpy.arange(len(owner)), numpy.arange(owner.max() + 1)
    sizes = numpy.bincount(owner).astype(float)
    loads: Floats = numpy.bincount(owner, weights=profile).astype(float)
    moved = profile[:, None] - profile[None, :]
    for _ in range(MAX_POLISH):
        costs = group_costs(sizes, loads, profile, limits)
        own = costs[owner]
        without = group_costs(sizes[owner] - 1, loads[owner] - profile, profile, limits)
        beside = group_costs(sizes[None, :] + 1, loads[None, :] + profile[:, None], profile, limits)
        moves = without[:, None] + beside - own[:, None] - costs[None, :]
        moves[ranks, owner] = 0.0
        without_for = group_costs(sizes[owner][:, None], loads[owner][:, None] - moved, profile, limits)
        swaps = without_for + without_for.T - own[:, None] - own[None, :]
        swaps[owner[:, None] == owner[None, :]] = 0.0
        rank, to = divmod(int(moves.argmin()), len(groups))
        one, other = divmod(int(swaps.argmin()), len(owner))
        if min(moves[rank, to], swaps[one, other]) >= -1e-9:
            break
        if moves[rank, to] <= swaps[one, other]:
            owner[rank] = to
        else:
            owner[one], owner[other] = owner[other], owner[one]
        sizes = numpy.bincount(owner, minlength=len(groups)).astype(float)
        loads = numpy.bincount(owner, weights=profile, minlength=len(groups)).astype(float)
    return owner


def _why_impossible(profile: Floats, limits: Limits, most: int, groups: int | None) -> str:
    experts = len(profile)
    named = f"{most} groups" if groups is not None else f"{most} groups, the most there may be,"
    if most * limits.largest < experts:
        return f"plan: {named} of {limits.largest} experts per layer, which memory holds, are too few for {experts}"
    bound = limits.max_replicas
    hottest = int(replicas_for(profile[:1], limits.capacity)[0])
    if bound is not None and hottest > bound:
        return (
            f"plan: scaling target not reachable: the hottest expert of each layer needs {hottest} replicas, "
            f"max_replicas is {bound}"
        )
    needed = int(replicas_for(profile.sum(keepdims=True), limits.capacity)[0])
    return f"plan: scaling target not reachable: {needed} replicas are needed, {named} of {bound} replicas each given"
