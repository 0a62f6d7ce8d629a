"""Replicas that start, drain and wait for nodes."""

from __future__ import annotations

import numpy
from simulation.scenarios import scenario

from expertmesh.simulation.fleet import Fleet
from expertmesh.simulation.layout import make_layout

START = {"pull_s": 4, "process_s": 6, "load_gb_per_s": 1e9, "spread": 0, "drain_s": 5}
NODES = {"gpus": 2, "max_nodes": 10, "provision_s": 100, "spread": 0, "idle_s": 50}


def fleet(replicas: int, **nodes: object) -> Fleet:
    described = scenario(division__experts_per_group=16, start=START, nodes=NODES | nodes)
    layout = make_layout(described)
    assert len(layout.groups) == 2
    return Fleet(described, layout, numpy.full(2, replicas))


def test_a_replica_starts_after_its_delay_on_a_free_gpu() -> None:
    one = fleet(1, min_nodes=2)
    one.ask(0, 3, 1.0)
    one.advance(10.9)
    assert (one.running, one.replicas) == ([1, 1], 4)
    one.advance(11.1)
    assert one.running == [3, 1]
    assert one.used.nodes_started == 0


def test_a_node_is_asked_for_when_none_is_free_and_given_back_when_idle() -> None:
    one = fleet(1)
    one.ask(0, 2, 0.0)
    one.advance(99.0)
    assert (one.nodes, one.pending, one.running) == (1, 1, [1, 1])
    one.advance(111.0)
    assert (one.nodes, one.pending, one.running) == (2, 0, [2, 1])
    one.ask(0, 1, 0.0)
    one.advance(115.9)
    assert one.replicas == 3, "it drains"
    for now in (117.0, 160.0, 170.0):
        one.advance(now)
    assert (one.nodes, one.replicas) == (1, 2)


def test_no_more_nodes_than_there_are() -> None:
    one = fleet(1, max_nodes=2)
    one.ask(0, 30, 0.0)
    one.advance(10_000.0)
    assert (one.nodes, one.replicas, one.pending, one.running) == (2, 4, 27, [3, 1])
    one.ask(0, 2, 0.0)
    one.advance(10_001.0)
    assert one.pending == 0, "what waits goes first"
    assert one.running == [2, 1]


def test_what_starts_is_called_off_before_what_runs() -> None:
    one = fleet(1, min_nodes=5)
    one.ask(0, 4, 0.0)
    one.advance(5.0)
    one.ask(0, 1, 0.0)
    one.advance(5.0)
    assert (one.running, one.replicas) == ([1, 1], 2)
    one.advance(100.0)
    assert one.running == [1, 1]


def test_integrals_are_exact_between_events() -> None:
    one = fleet(1, min_nodes=5)
    one.ask(0, 2, 4.0)
    one.advance(20.0)
    assert one.used.replica_s == 2 * 20 + 16
    assert one.used.node_gpu_s == 5 * 2 * 20
    assert (one.used.ups, one.used.downs, one.used.peak_replicas) == (1, 0, 3)
