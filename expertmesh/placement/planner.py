"""The planner: from loads to a division of experts into groups; a pure function.

Of the divisions that keep every group at or below its busy share, it looks for the one with the least memory x time:
experts are ranked by load in each layer, the ranks are cut into groups, and each layer is then improved by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from expertmesh.artifact.manifest import Manifest
from expertmesh.coverage import GIB
from expertmesh.errors import ConfigError
from expertmesh.placement.arrays import Floats, Indices
from expertmesh.placement.balance import place
from expertmesh.placement.division import Division, Held, evaluate
from expertmesh.placement.loads import Loads, check_loads, pair_matrix
from expertmesh.placement.ranks import BALANCE_WEIGHT, GROWTH_WEIGHT, REPLICA_WEIGHT, Limits, cut, polish, replicas_for
from expertmesh.placement.refine import Objective, add_homes, even_out, place_pairs

NO_COACTIVATION = "these loads do not tell which experts fire together; only a file with coactivation does (--loads)"


@dataclass(frozen=True)
class Aims:
    rows_per_replica: float
    """Rows/s, over all layers, of a replica that computes all the time."""
    target_busy: float = 0.6
    groups: int | None = None
    """None: as many as are worth it."""
    memory_gib: float | None = None
    """Of experts, that one replica may hold."""
    max_replicas: int | None = None
    """Of one group; None: as many as it needs."""
    objective: Objective = "spread"
    second_homes: int = 0
    """Places per layer that its experts may have in further groups."""

    @property
    def capacity(self) -> float:
        """Rows/s of a replica at its target."""
        return self.rows_per_replica * self.target_busy


def divide(manifest: Manifest, loads: Loads, aims: Aims, today: Held | None = None) -> Division:
    """The cheapest division found, `today`'s [L, G, E] among them where it fits the aims; groups are sorted from hot to
    cold.

    Raises ConfigError where the loads are of another model, memory cannot hold the experts or the target cannot be
    reached.
    """
    check_loads(loads, manifest, "loads")
    if aims.objective == "gather" and not loads.coactivation:
        raise ConfigError(f"plan: objective gather: {NO_COACTIVATION}")
    limits = Limits(aims.capacity, _largest(manifest, aims), aims.max_replicas)
    array = loads.array(manifest)
    # from here on every layer's experts stand from hot to cold, so that their order in the model decides nothing
    order = numpy.argsort(-array, axis=1, kind="stable")
    array = numpy.take_along_axis(array, order, axis=1)
    if today is not None:
        today = numpy.take_along_axis(today, order[:, None, :], axis=2)
    pairs = _pairs(loads, manifest, order)
    candidates = []
    for start in _starts(array, limits, aims, today):
        as_it_is = evaluate(start, numpy.nan_to_num(array), aims.capacity)
        improved = _improved(as_it_is, array, pairs, aims, limits.largest)
        # what was asked for must not lose to a division that knows nothing of it
        candidates += [improved] if loads.coactivation or aims.second_homes else [as_it_is, improved]
    reachable = [one for one in candidates if _reaches(one, aims)]
    if not reachable:
        fullest = int(candidates[0].replicas.max())
        raise ConfigError(
            f"plan: scaling target not reachable: a group needs {fullest} replicas, max_replicas is {aims.max_replicas}"
        )
    best = _hot_first(min(reachable, key=lambda one: cost(one, aims.capacity)))
    back = numpy.argsort(order, axis=1)[:, None, :]
    held, served = numpy.take_along_axis(best.held, back, axis=2), numpy.take_along_axis(best.served, back, axis=2)
    return Division(held, served, best.replicas)


def _starts(array: Floats, limits: Limits, aims: Aims, today: Held | None) -> list[Held]:
    """Divisions to begin with: cut along the ranks, the same with ranks moved, equal groups, today's."""
    profile = _profile(array)
    cuts = cut(profile, limits, aims.groups)
    owner = numpy.repeat(numpy.arange(len(cuts) - 1), numpy.diff(cuts))
    starts = [_held(array, owner), _held(array, polish(owner, profile, limits))]
    even = _even(array, len(cuts) - 1, limits.largest)
    if even is not None:
        starts.append(even)
    if today is not None:
        fits = aims.groups in {None, today.shape[1]} and today.sum(axis=2).max() <= limits.largest
        if fits and (today.any(axis=1) == ~numpy.isnan(array)).all() and today.any(axis=(0, 2)).all():
            starts.append(today)
    return starts


def cost(division: Division, capacity: float) -> float:
    """What the planner minimizes: memory x time as multiples of all experts held once, plus the weights of `ranks`."""
    once = float(division.held.any(axis=1).sum())
    total = float(division.group_loads.sum())
    replicas = float(division.replicas.sum()) / max(1.0, total / capacity)
    uneven = 1.0 - float(division.balancedness.mean())
    growth = float(division.sizes @ division.group_loads) / (once * total)
    return division.copies / once + REPLICA_WEIGHT * replicas + BALANCE_WEIGHT * uneven + GROWTH_WEIGHT * growth


def _largest(manifest: Manifest, aims: Aims) -> int:
    """Experts per layer that one replica's memory holds."""
    if aims.memory_gib is None:
        return max(manifest.layers.values())
    held = int(aims.memory_gib * GIB // manifest.expert_bytes)
    layers = len(manifest.layers)
    if held < layers:
        each = manifest.expert_bytes / GIB
        raise ConfigError(
            f"plan: {aims.memory_gib:g} GiB per replica cannot hold one expert of each of {layers} layers, "
            f"{layers * each:.3g} GiB"
        )
    return held // layers


def _profile(loads: Floats) -> Floats:
    """[E], rows/s of each rank, over all layers; layers with fewer experts are stretched to the longest."""
    experts = loads.shape[1]
    profile = numpy.zeros(experts)
    for layer in loads:
        ordered = layer[~numpy.isnan(layer)]
        reached = numpy.concatenate([[0.0], ordered.cumsum()])
        at = numpy.linspace(0, len(ordered), experts + 1)
        profile += numpy.diff(numpy.interp(at, numpy.arange(len(reached)), reached))
    return profile


def _held(loads: Floats, owner: Indices) -> Held:
    """[L, G, E]: each layer's experts go to the groups that own their ranks [E]."""
    layers, experts = loads.shape
    held = numpy.zeros((layers, int(owner.max()) + 1, experts), dtype=bool)
    for layer, count in enumerate((~numpy.isnan(loads)).sum(axis=1)):
        rank = numpy.arange(count)
        held[layer, owner[rank * experts // count], rank] = True
    return held


def _even(loads: Floats, groups: int, largest: int) -> Held | None:
    """[L, G, E]: groups with equally many slots, as `place` fills them; None where layers differ or memory is short."""
    layers, experts = loads.shape
    room = -(-experts // groups)
    if room > largest or numpy.isnan(loads).any():
        return None
    placed = place(loads, room * groups, groups)
    held = numpy.zeros((layers, groups, experts), dtype=bool)
    held[numpy.arange(layers)[:, None], numpy.arange(room * groups) // room, placed] = True
    return held


def _pairs(loads: Loads, manifest: Manifest, order: Indices) -> list[Floats | None]:
    """Per layer [E, E], in the order of the experts in `order` [L, E]."""
    found = []
    for row, (layer, count) in enumerate(sorted(manifest.layers.items())):
        pairs = pair_matrix(loads.coactivation, layer, count)
        found.append(None if pairs is None else pairs[numpy.ix_(order[row, :count], order[row, :count])])
    return found


def _improved(start: Division, loads: Floats, pairs: list[Floats | None], aims: Aims, largest: int) -> Division:
    held, replicas = start.held.copy(), numpy.maximum(start.replicas, 1.0)
    counts = (~numpy.isnan(loads)).sum(axis=1)
    for layer, count in enumerate(counts):
        part, rates, pairs_of_layer = held[layer, :, :count], loads[layer, :count], pairs[layer]
        if (part.sum(axis=0) == 1).all():
            even_out(part, rates, replicas)
            if pairs_of_layer is not None:
                place_pairs(part, rates, replicas, pairs_of_layer, aims.objective)
        if aims.second_homes:
            add_homes(part, rates, replicas, largest, aims.second_homes)
    return evaluate(held, numpy.nan_to_num(loads), aims.capacity)


def _reaches(division: Division, aims: Aims) -> bool:
    return aims.max_replicas is None or bool(division.replicas.max() <= aims.max_replicas)


def _hot_first(division: Division) -> Division:
    """Groups by load per expert, descending."""
    density = division.group_loads / numpy.maximum(division.sizes, 1)
    order = numpy.argsort(-density, kind="stable")
    return Division(division.held[:, order], division.served[:, order], division.replicas[order])


def needed_replicas(division: Division, capacity: float, growth: float) -> Floats:
    """[G]: replicas for `growth` times the loads, those of today at least."""
    needed: Floats = numpy.maximum(division.replicas, replicas_for(division.group_loads * growth, capacity))
    return needed
