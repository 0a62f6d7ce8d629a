"""The baseline: DeepSeek's Expert Parallelism Load Balancer, written anew from its published description.

Source: github.com/deepseek-ai/EPLB. Its policy in three steps: groups of experts are packed onto nodes (hierarchical;
left out where there are no groups: global), the most loaded experts of a node get its spare slots, and the copies are
packed onto the node's devices. The published code is torch with a Python loop over layers, copies and devices in the
packing. Here both loops run over copies alone, for all layers at once in numpy, which gives the same placements in a
fraction of the time, so that a comparison with it is one of algorithms.
"""

from __future__ import annotations

import numpy

from expertmesh.errors import ConfigError
from expertmesh.placement.arrays import Floats, Indices


def eplb(loads: Floats, slots: int, devices: int, expert_groups: int = 1, nodes: int = 1) -> Indices:
    """loads [L, E] -> experts [L, slots]: device d holds slots d * slots / devices and following.

    `expert_groups` > 1 with `nodes` > 1 is the hierarchical policy, anything else the global one. Raises ConfigError
    where slots, devices, groups and nodes do not divide as the algorithm needs.
    """
    check_slots(loads.shape[1], slots, devices)
    if nodes == 1 or expert_groups == 1:
        return _replicate_and_pack(loads, slots, devices)
    layers, experts = loads.shape
    if experts % expert_groups or expert_groups % nodes or devices % nodes or slots % nodes:
        raise ConfigError(f"eplb: {experts} experts in {expert_groups} groups do not divide over {nodes} nodes")
    size = experts // expert_groups
    group_loads = loads.reshape(layers, expert_groups, size).sum(axis=2)
    group_order = pack_in_turn(group_loads, nodes)
    # [L, E]: experts in the order of the nodes that they are packed onto
    by_node = (group_order[:, :, None] * size + numpy.arange(size)).reshape(layers, experts)
    of_node = numpy.take_along_axis(loads, by_node, axis=1).reshape(layers * nodes, experts // nodes)
    placed = _replicate_and_pack(of_node, slots // nodes, devices // nodes).reshape(layers, nodes, -1)
    placed = placed + (numpy.arange(nodes) * (experts // nodes))[:, None]
    return numpy.take_along_axis(by_node, placed.reshape(layers, slots), axis=1)


def check_slots(experts: int, slots: int, devices: int) -> None:
    """Raises ConfigError where `slots` cannot hold all experts or do not divide over the devices."""
    if devices < 1 or slots % devices:
        raise ConfigError(f"placement: {slots} slots do not divide over {devices} devices")
    if slots < experts:
        raise ConfigError(f"placement: {slots} slots cannot hold {experts} experts")


def replicate(loads: Floats, slots: int) -> tuple[Indices, Floats]:
    """Experts [L, slots] and the load of each copy [L, slots]: one slot after the other goes to the expert whose
    copies carry most. That is the least possible maximum per copy."""
    layers, experts = loads.shape
    rows = numpy.arange(layers)
    chosen = numpy.empty((layers, slots), dtype=numpy.int64)
    chosen[:, :experts] = numpy.arange(experts)
    counts = numpy.ones((layers, experts))
    per_copy = loads.astype(numpy.float64)
    for slot in range(experts, slots):
        most = per_copy.argmax(axis=1)
        chosen[:, slot] = most
        counts[rows, most] += 1
        per_copy[rows, most] = loads[rows, most] / counts[rows, most]
    return chosen, numpy.take_along_axis(per_copy, chosen, axis=1)


def pack_in_turn(loads: Floats, packs: int) -> Indices:
    """loads [L, N] -> items [L, N] in the order of packs, N / packs each: heaviest first, each into the least loaded
    pack that has room."""
    layers, items = loads.shape
    room = items // packs
    if room == 1:
        return numpy.broadcast_to(numpy.arange(items), loads.shape).copy()
    rows = numpy.arange(layers)
    order = numpy.argsort(-loads, axis=1, kind="stable")
    ordered = numpy.take_along_axis(loads, order, axis=1)
    pack_loads = numpy.zeros((layers, packs))
    used = numpy.zeros((layers, packs), dtype=numpy.int64)
    packed = numpy.empty((layers, items), dtype=numpy.int64)
    for item in range(items):
        pack = pack_loads.argmin(axis=1)
        place = used[rows, pack]
        packed[rows, pack * room + place] = order[:, item]
        used[rows, pack] = place + 1
        full = place + 1 == room
        pack_loads[rows, pack] += numpy.where(full, numpy.inf, ordered[:, item])
    return packed


def _replicate_and_pack(loads: Floats, slots: int, devices: int) -> Indices:
    chosen, per_copy = replicate(loads, slots)
    return numpy.take_along_axis(chosen, pack_in_turn(per_copy, devices), axis=1)
