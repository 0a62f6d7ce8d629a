"""Messages as the router makes them: against `choose_replicas` and the emulated device's own formula."""

from __future__ import annotations

import numpy
import pytest
from simulation.scenarios import scenario

from expertmesh.config import EmulatedDevice
from expertmesh.scaling.emulation import batch_s
from expertmesh.simulation.demand import demand, messages, shares_of
from expertmesh.simulation.layout import make_layout
from expertmesh.simulation.service import DeviceArrays
from router_service.dispatch.choice import Candidate, choose_replicas


def test_the_device_is_the_emulated_one() -> None:
    devices = [
        EmulatedDevice(teraflops=1, memory_gb_per_s=2, overhead_us=30),
        EmulatedDevice(teraflops=90, memory_gb_per_s=600),
    ]
    cost = scenario().model.cost
    pairs, experts = numpy.array([7.0, 3000.0]), numpy.array([3.0, 16.0])
    found = DeviceArrays.of(devices).batch_s(cost, pairs, experts)
    assert found.tolist() == [
        batch_s(device, cost, int(count), int(touched))
        for device, count, touched in zip(devices, pairs, experts, strict=True)
    ]


@pytest.mark.parametrize("rows_per_expert", [1, 6, 16])
@pytest.mark.parametrize("replicas", [1, 3, 16])
def test_dispatches_are_divided_as_by_the_router(rows_per_expert: int, replicas: int) -> None:
    experts = 8
    candidates = [Candidate(f"r{number:02}", frozenset(range(experts)), 0) for number in range(replicas)]
    owners, _ = choose_replicas(dict.fromkeys(range(experts), rows_per_expert), candidates)
    described = scenario(model__experts=experts, model__top_k=1, division__experts_per_group=experts)
    layout = make_layout(described)
    step_rows = rows_per_expert * experts
    asked = demand(layout, 1000.0, numpy.full(len(layout.pairs), 1 / experts), step_rows)
    sent = messages(layout, asked, numpy.array([float(replicas)]))
    per_dispatch = sent.per_s[0] / asked.dispatches_per_s[0]
    assert per_dispatch == pytest.approx(len(set(owners.values())), rel=0.4)
    assert per_dispatch * sent.pairs[0] == pytest.approx(asked.pairs[0])


def test_every_pair_of_a_step_reaches_a_group() -> None:
    described = scenario()
    layout = make_layout(described)
    chances = numpy.random.default_rng(1).random(4 * 32).reshape(4, 32)
    chances *= 4 / chances.sum(axis=1, keepdims=True)
    asked = demand(layout, 5000.0, numpy.minimum(chances, 1).ravel()[layout.pairs], 64)
    pairs_per_s = (asked.dispatches_per_s * asked.pairs).sum()
    assert pairs_per_s == pytest.approx(5000 * numpy.minimum(chances, 1).sum())


def test_an_expert_in_two_groups_is_shared_by_running_replicas() -> None:
    groups = [{"name": "a", "experts": "0-31", "max_replicas": 9}, {"name": "b", "experts": "3", "max_replicas": 9}]
    layout = make_layout(scenario(division=None, groups=groups))
    shares = shares_of(layout, numpy.array([1.0, 3.0]))
    by_pair = dict(zip(zip(layout.group_of.tolist(), layout.pairs.tolist(), strict=True), shares.tolist(), strict=True))
    assert (by_pair[0, 3], by_pair[1, 3], by_pair[0, 4]) == (0.25, 0.75, 1.0)
