"""Placements on equal devices: complete, repeatable, and never worse than EPLB's."""

from __future__ import annotations

import random

import numpy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from placement_values import zipf

from expertmesh.errors import ConfigError
from expertmesh.placement.arrays import Floats, balancedness, device_loads
from expertmesh.placement.balance import place
from expertmesh.placement.eplb import eplb, pack_in_turn, replicate

LIMIT = 1 - 1e-9


@st.composite
def problems(draw: st.DrawFn) -> tuple[Floats, int, int]:
    """Loads [L, E], slots, devices; loads with many ties and zeros among them."""
    layers, devices, room = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    slots = devices * room
    experts = draw(st.integers(max(1, slots - 8), slots))
    load = draw(st.sampled_from([st.integers(0, 3), st.integers(0, 1000), st.floats(0, 1e6, allow_subnormal=False)]))
    rows = draw(st.lists(st.lists(load, min_size=experts, max_size=experts), min_size=layers, max_size=layers))
    return numpy.array(rows, dtype=float), slots, devices


@settings(max_examples=250, deadline=None)
@given(problems())
def test_never_worse_than_eplb(problem: tuple[Floats, int, int]) -> None:
    loads, slots, devices = problem
    ours, theirs = place(loads, slots, devices), eplb(loads, slots, devices)
    assert (place(loads, slots, devices) == ours).all()
    for placed in (ours, theirs):
        assert placed.shape == (len(loads), slots)
        assert all(set(row) == set(range(loads.shape[1])) for row in placed.tolist())
    found = balancedness(device_loads(loads, ours, devices))
    assert (found >= balancedness(device_loads(loads, theirs, devices)) * LIMIT).all()


@settings(max_examples=100, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_experts_does_not_matter(problem: tuple[Floats, int, int], order: random.Random) -> None:
    # without spare slots: which of two experts that tie gets one is a matter of order, in EPLB too
    loads, _, devices = problem
    loads = loads[:, : loads.shape[1] // devices * devices]
    slots = loads.shape[1]
    assume(slots)
    shuffled = list(range(slots))
    order.shuffle(shuffled)
    found = [
        balancedness(device_loads(one, place(one, slots, devices), devices)) for one in (loads, loads[:, shuffled])
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.0, 1.2])
@pytest.mark.parametrize(
    ("experts", "slots", "devices"),
    [(8, 8, 4), (16, 24, 8), (64, 64, 16), (64, 80, 16), (256, 256, 64), (256, 320, 32)],
)
def test_zipf(experts: int, slots: int, devices: int, exponent: float) -> None:
    loads = zipf(8, experts, exponent)
    ours = balancedness(device_loads(loads, place(loads, slots, devices), devices))
    assert (ours >= balancedness(device_loads(loads, eplb(loads, slots, devices), devices)) * LIMIT).all()


def test_swaps_find_what_the_greedy_misses() -> None:
    loads = zipf(8, 64, 1.0)
    ours, theirs = (balancedness(device_loads(loads, way(loads, 80, 16), 16)) for way in (place, eplb))
    assert ours.mean() > theirs.mean() + 0.001


def test_the_baseline_replicates_and_packs_as_published() -> None:
    loads = numpy.array([[10.0, 4.0, 1.0, 1.0]])
    chosen, per_copy = replicate(loads, 6)
    assert chosen.tolist() == [[0, 1, 2, 3, 0, 0]]
    assert per_copy[0] == pytest.approx([10 / 3, 4, 1, 1, 10 / 3, 10 / 3])
    # heaviest first into the least loaded: 4 alone with 1 and 1, the copies of 10/3 on the other
    assert pack_in_turn(numpy.array([[4.0, 3.0, 2.0, 1.0]]), 2).tolist() == [[0, 3, 1, 2]]


def test_the_hierarchical_baseline_keeps_groups_on_nodes() -> None:
    loads = zipf(3, 16, 1.0)
    placed = eplb(loads, 24, 8, expert_groups=4, nodes=2)
    for row in placed.reshape(3, 2, 12).tolist():
        on_nodes = [{expert // 4 for expert in node} for node in row]
        assert not on_nodes[0] & on_nodes[1]
        assert len(on_nodes[0]) == len(on_nodes[1]) == 2


@pytest.mark.parametrize(
    ("slots", "devices", "said"),
    [(7, 7, "7 slots cannot hold 8 experts"), (9, 4, "9 slots do not divide over 4 devices"), (8, 0, "0 devices")],
)
def test_slots_that_do_not_do(slots: int, devices: int, said: str) -> None:
    loads = zipf(1, 8, 1.0)
    for way in (place, eplb):
        with pytest.raises(ConfigError, match=said):
            way(loads, slots, devices)


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="3 groups do not divide over 2 nodes"):
        eplb(zipf(1, 12, 1.0), 12, 4, expert_groups=3, nodes=2)
