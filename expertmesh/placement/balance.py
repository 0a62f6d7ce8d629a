"""Copies of experts onto equal devices with equal numbers of slots, for all layers at once: never worse than EPLB.

Slots are shared out as EPLB does it, which is optimal for the heaviest copy. The packing is another: where the heaviest
copy alone decides, or a device has two slots, the best packing is known and written down; elsewhere the greedy's result
is found in batches of copies and then improved by swaps between the fullest and the emptiest device.
"""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

from expertmesh.placement.arrays import Floats, Indices
from expertmesh.placement.eplb import check_slots, replicate

MAX_SWAPS, SLOTS_PER_SWAP = 12, 12
"""A layer's swaps at most, and the slots that pay for one: the first few bring most."""


def place(loads: Floats, slots: int, devices: int) -> Indices:
    """loads [L, E] -> experts [L, slots]: device d holds slots d * slots / devices and following.

    Raises ConfigError where the slots cannot hold all experts or do not divide over the devices.
    """
    check_slots(loads.shape[1], slots, devices)
    chosen, per_copy = replicate(loads, slots)
    if slots == devices:
        return chosen
    rows = numpy.arange(len(loads))[:, None]
    heaviest_first = numpy.argsort(-per_copy, axis=1, kind="stable")
    sorted_loads, sorted_experts = per_copy[rows, heaviest_first], chosen[rows, heaviest_first]
    slot_of = pack(sorted_loads, devices)
    placed = numpy.empty_like(chosen)
    placed[rows, slot_of] = sorted_experts
    return placed


def pack(items: Floats, devices: int) -> Indices:
    """items [L, S], each layer's descending -> the slot of each; device d has slots d * S / devices and following.

    The largest sum of a device is never more than what EPLB's packing gives.
    """
    room = items.shape[1] // devices
    if devices == 1:
        return numpy.broadcast_to(numpy.arange(room), items.shape)
    if room == 2:
        return numpy.broadcast_to(_folded(devices), items.shape)
    slots, proven = _around_heaviest(items, devices)
    rest = numpy.flatnonzero(~proven)
    if len(rest):
        left = items if len(rest) == len(items) else items[rest]
        found = _greedy(left, devices)
        _swap(left, found, devices)
        if len(rest) == len(items):
            return found
        slots[rest] = found
    return slots


def _folded(devices: int) -> Indices:
    """Two slots each: the heaviest with the lightest, and so on, has the least maximum."""
    device = numpy.arange(devices)
    return numpy.concatenate([2 * device, 2 * device[::-1] + 1])


def _around_heaviest(items: Floats, devices: int) -> tuple[Indices, NDArray[numpy.bool_]]:
    """A packing with the heaviest item beside the lightest, and in which layers that proves it the best there is:
    no other device carries more, and the heaviest item can have no lighter company."""
    layers, count = items.shape
    room = count // devices
    least = items[:, 0] + items[:, count - room + 1 :].sum(axis=1)
    hopeful = numpy.flatnonzero(least >= items.sum(axis=1) / devices)
    slots = numpy.empty((layers, count), dtype=numpy.int64)
    proven = numpy.zeros(layers, dtype=bool)
    if not len(hopeful):
        return slots, proven
    rows = numpy.arange(len(hopeful))[:, None]
    others = items[hopeful, 1 : count - room + 1].reshape(len(hopeful), room, devices - 1)
    found = numpy.empty((len(hopeful), count), dtype=numpy.int64)
    found[:, 0] = 0
    found[:, count - room + 1 :] = numpy.arange(1, room)
    sums = numpy.zeros((len(hopeful), devices - 1))
    for turn in range(room):
        emptiest = numpy.argsort(sums, axis=1)
        sums[rows, emptiest] += others[:, turn]
        first = 1 + turn * (devices - 1)
        found[:, first : first + devices - 1] = (emptiest + 1) * room + turn
    slots[hopeful] = found
    proven[hopeful] = sums.max(axis=1, initial=0.0) <= least[hopeful]
    return slots, proven


def _greedy(items: Floats, devices: int) -> Indices:
    """Each item into the emptiest device with room, as EPLB packs, but many at a time: the emptiest devices get one
    each for as long as none of those just served would be the emptiest again."""
    layers, count = items.shape
    room = count // devices
    padded = numpy.full((layers, count + devices), numpy.inf)
    padded[:, :count] = items
    slots = numpy.empty((layers, count + devices), dtype=numpy.int64)
    slots[:, :devices] = numpy.arange(devices) * room
    sums, used = items[:, :devices].copy(), numpy.ones((layers, devices), dtype=numpy.int64)
    # the arrays as flat ones: indices of a whole batch are made once
    flat_items, flat_slots, flat_sums, flat_used = padded.ravel(), slots.ravel(), sums.ravel(), used.ravel()
    first_device = numpy.arange(layers)[:, None] * devices
    first_item = numpy.arange(layers)[:, None] * (count + devices) + numpy.arange(devices)
    column = numpy.arange(devices)
    done = numpy.full(layers, devices)
    while True:
        order = numpy.argsort(sums, axis=1, kind="stable")
        at, items_at = order + first_device, first_item + done[:, None]
        before, taken = flat_sums[at], flat_used[at]
        after = before + flat_items[items_at]
        full = taken == room - 1
        after_full = numpy.where(full, numpy.inf, after)
        again = numpy.minimum.accumulate(after_full, axis=1)
        stop = before[:, 1:] >= again[:, :-1]
        stop |= after[:, 1:] == numpy.inf
        batch = numpy.where(stop.any(axis=1), stop.argmax(axis=1) + 1, devices)
        numpy.minimum(batch, count - done, out=batch)
        flat_slots[items_at] = order * room + taken
        inside = column < batch[:, None]
        flat_sums[at] = numpy.where(inside, after_full, before)
        flat_used[at] = taken + inside
        done += batch
        if done.min() == count:
            return slots[:, :count]


def _swap(items: Floats, slots: Indices, devices: int) -> None:
    """Improves `slots` in place: two items change places between the fullest and the emptiest device of a layer as
    long as that lowers the larger of both sums."""
    layers, count = items.shape
    room = count // devices
    all_rows = numpy.arange(layers)
    item_in = numpy.empty((layers, count), dtype=numpy.int64)
    item_in[all_rows[:, None], slots] = numpy.arange(count)
    held = item_in.reshape(layers, devices, room)
    weights = items[all_rows[:, None], item_in].reshape(layers, devices, room)
    sums = weights.sum(axis=2)
    rows = all_rows
    for _ in range(min(MAX_SWAPS, count // SLOTS_PER_SWAP)):
        left = sums[rows]
        fullest, emptiest = left.argmax(axis=1), left.argmin(axis=1)
        high, low = left[numpy.arange(len(rows)), fullest], left[numpy.arange(len(rows)), emptiest]
        gains = weights[rows, fullest][:, :, None] - weights[rows, emptiest][:, None, :]
        # what leaves the fullest should be half of the difference; |gain - half| < half lowers the larger sum
        half = (high - low) / 2
        misses = numpy.abs(gains.reshape(len(rows), -1) - half[:, None])
        best = misses.argmin(axis=1)
        better = misses[numpy.arange(len(rows)), best] < half * (1 - 1e-9)
        if not better.any():
            break
        rows, fullest, emptiest, best = rows[better], fullest[better], emptiest[better], best[better]
        give, take = best // room, best % room
        for array in (weights, held):
            array[rows, fullest, give], array[rows, emptiest, take] = (
                array[rows, emptiest, take],
                array[rows, fullest, give],
            )
        for device in (fullest, emptiest):
            sums[rows, device] = weights[rows, device].sum(axis=1)
    slots[all_rows[:, None], held.reshape(layers, count)] = numpy.arange(count)
