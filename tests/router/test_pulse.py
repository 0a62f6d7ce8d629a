"""Replicas that fall silent while no rows flow: known within a second, passed over, taken again once they answer."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mesh import TRANSPORTS, running_directory, running_dispatcher

from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError
from expertmesh.v1 import directory_pb2
from loadtest.partition import cut_off
from router_service.dispatcher import Dispatcher
from router_service.transport.pulse import LOOK_S, LOOKS, Pulse

HIDDEN_SIZE = 256
PATIENCE_S = 60.0


class Peer:
    """A replica by hand: `here` says whether it answers."""

    def __init__(self) -> None:
        self.here, self.idle, self.asked = True, True, 0
        self.lost = False

    def ask(self) -> Callable[[], bool | None]:
        self.asked += 1
        return lambda: None if self.lost else self.here


def pulse_of(peer: Peer) -> Pulse:
    return Pulse(peer.ask, lambda: peer.idle)


def test_silence_is_known_within_a_second_whenever_it_begins() -> None:
    assert 2 * LOOKS * LOOK_S < 1
    for before in range(3 * LOOKS):
        peer = Peer()
        pulse = pulse_of(peer)
        assert False not in [pulse.look() for _ in range(before)]
        peer.here = False
        looks = next(number for number in itertools.count(1) if pulse.look() is False)
        assert LOOKS <= looks <= 2 * LOOKS


def test_an_answer_is_seen_at_the_next_look_and_the_question_stands_until_then() -> None:
    peer = Peer()
    pulse = pulse_of(peer)
    peer.here = False
    assert [pulse.look() for _ in range(4 * LOOKS)].count(False) == 3  # told again, for who could not be spared before
    assert peer.asked == 1
    peer.here = True
    assert pulse.look() is True


def test_a_question_that_cannot_be_answered_any_more_is_asked_again() -> None:
    peer = Peer()
    pulse = pulse_of(peer)
    peer.lost = True
    assert [pulse.look() for _ in range(2 * LOOKS)][-1] is False
    assert peer.asked == 2
    peer.lost = False
    assert pulse.look() is True


def test_one_question_in_each_interval_and_none_while_rows_are_under_way() -> None:
    peer = Peer()
    pulse = pulse_of(peer)
    for _ in range(10 * LOOKS):
        pulse.look()
    assert peer.asked == 10
    peer.idle = False
    assert {pulse.look() for _ in range(10 * LOOKS)} == {True, None}  # True: to the last one that was asked
    assert peer.asked == 10


@contextmanager
def two_replicas(artifact: Path) -> Iterator[tuple[str, list[directory_pb2.Replica]]]:
    """Processes that serve the same experts; yields the directory and what it says of them."""
    with ExitStack() as stack:
        directory = stack.enter_context(running_directory())
        for _ in range(2):
            options = ("--artifact", str(artifact), "--group", "a", "--experts", "0-15", "--directory", directory)
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-m", "expert_service", *options], stdout=subprocess.DEVNULL)
            )
            stack.callback(process.kill)
        until(lambda: len(list_table(directory).replicas) == 2)
        yield directory, list(list_table(directory).replicas)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s"
        time.sleep(0.005)


@contextmanager
def stopped(replica: directory_pb2.Replica) -> Iterator[None]:
    os.kill(replica.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(replica.pid, signal.SIGCONT)


@contextmanager
def unreachable(replica: directory_pb2.Replica) -> Iterator[None]:
    with cut_off(int(replica.address.rpartition(":")[2])):
        yield


@pytest.fixture(params=[stopped, unreachable])
def silent(request: pytest.FixtureRequest) -> Any:
    """A way to silence a replica; routing rules are root's to change, and not in every container."""
    if request.param is unreachable:
        try:
            with cut_off(1):
                pass
        except ClusterError as error:
            pytest.skip(str(error))
    return request.param


def step(router: Dispatcher) -> torch.Tensor:
    rows = torch.randn(6, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    return router.finish(router.start(0, rows, torch.full((6, 1), 4), torch.ones(6, 1)))


def rows_sent(router: Dispatcher) -> dict[str, int]:
    replicas = [*router.replicas.snapshot().values(), *(one.replica for one in router.replicas.suspended().values())]
    for replica in replicas:
        replica.refresh()
    return {replica.replica_id: replica.rows_sent for replica in replicas}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_replica_that_falls_silent_while_no_rows_flow(
    demo_artifact: Path, transport: str, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: Counter[int] = Counter()
    look = Pulse.look

    def counted(pulse: Pulse) -> bool | None:
        looks[id(pulse)] += 1
        return look(pulse)

    monkeypatch.setattr(Pulse, "look", counted)
    with (
        two_replicas(demo_artifact) as (directory, (victim, other)),
        running_dispatcher(demo_artifact, directory, transport) as router,
    ):
        until(lambda: len(router.replicas.snapshot()) == 2)
        expected = step(router)
        until(lambda: min(looks.values(), default=0) > 4 * LOOKS and len(router.replicas.snapshot()) == 2)
        with silent(victim):
            before, sent = max(looks.values()), rows_sent(router)
            until(lambda: bool(router.replicas.suspended()))
            assert max(looks.values()) - before <= 2 * LOOKS + 1  # one may have been under way
            assert set(router.replicas.suspended()) == {victim.replica_id}
            for _ in range(3):
                assert torch.equal(step(router), expected)
            assert router.counters.hedged == router.counters.resent_rows == router.counters.waited == 0
            assert rows_sent(router) == {**sent, other.replica_id: sent[other.replica_id] + 18}
        until(lambda: set(router.replicas.snapshot()) == {victim.replica_id, other.replica_id})
        for _ in range(4):
            assert torch.equal(step(router), expected)
        assert rows_sent(router)[victim.replica_id] > 0
