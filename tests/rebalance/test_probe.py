"""A new replica compared with real ones that serve already, of which some fail."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mesh import group_args
from mesh_cluster import Liar

from expert_service.executor import Executor, Pairs
from expert_service.replica import Replica
from expertmesh.artifact.manifest import read_manifest
from expertmesh.directory.client import list_table
from expertmesh.rebalance.probe import Unverified, Unwitnessed, Verified, verify
from expertmesh.v1 import directory_pb2

EXPERTS = frozenset({0, 1, 2, 3})
NOWHERE = "127.0.0.1:1"


class Failing:
    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        raise RuntimeError("out of order")


class Probed:
    """Replicas of one directory, by their group's name."""

    def __init__(self, artifact: Path, directory: str) -> None:
        self._artifact, self._directory = artifact, directory
        self._running: list[Replica] = []
        self.manifest = read_manifest(artifact)

    def start(self, name: str, experts: frozenset[int] = EXPERTS, executor: Executor | None = None) -> None:
        args = group_args(self._artifact, self._directory, name, set(experts))
        self._running.append(Replica(args, self._directory, executor=executor))

    def entry(self, name: str, busy: float = 0.0, address: str = "") -> directory_pb2.Replica:
        """As the directory has it, but so busy, and elsewhere where an address is given."""
        deadline = time.monotonic() + 20
        while not (listed := [one for one in list_table(self._directory).replicas if one.group == name]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (found,) = listed
        found.load.busy = busy
        found.address = address or found.address
        return found

    def verify(self, new: directory_pb2.Replica, *others: directory_pb2.Replica) -> Verified:
        wanted = dict.fromkeys(self.manifest.layers, EXPERTS)
        return verify(new, others, wanted, self.manifest.fingerprint)

    def close(self) -> None:
        for replica in self._running:
            replica.stop()


@pytest.fixture
def probed(tiny_artifact: Path, directory: str) -> Iterator[Probed]:
    made = Probed(tiny_artifact, directory)
    made.start("new")
    made.start("old")
    yield made
    made.close()


def test_a_witness_that_is_away_is_replaced_by_the_next(probed: Probed) -> None:
    found = probed.verify(probed.entry("new"), probed.entry("old", 0.5), probed.entry("old", 0.1, NOWHERE))
    assert (found.compared, found.alone) == (8, 0) and found.worst < 1e-3
    (failed,) = found.failed
    assert failed.startswith(f"{NOWHERE}: ")


def test_a_witness_that_answers_an_error_is_replaced_by_the_next(probed: Probed) -> None:
    probed.start("ill", executor=Failing())
    ill = probed.entry("ill", 0.1)
    found = probed.verify(probed.entry("new"), probed.entry("old", 0.5), ill)
    assert (found.compared, found.alone) == (8, 0)
    (failed,) = found.failed
    assert failed.startswith(f"{ill.address}: layer 0: CODE_")


def test_each_expert_is_asked_of_who_holds_it(probed: Probed) -> None:
    probed.start("half", frozenset({0, 1}))
    others = probed.entry("half", 0.1), probed.entry("old", 0.2, NOWHERE), probed.entry("old", 0.5)
    assert probed.verify(probed.entry("new"), *others).compared == 8
    alone = probed.verify(probed.entry("new"), others[0])
    assert (alone.compared, alone.alone, alone.failed) == (4, 4, ())


def test_witnesses_that_all_fail_say_nothing_of_the_new_replica(probed: Probed) -> None:
    probed.start("ill", executor=Failing())
    ill = probed.entry("ill", 0.1)
    with pytest.raises(Unwitnessed) as refused:
        probed.verify(probed.entry("new"), ill, probed.entry("old", 0.5, NOWHERE))
    text = str(refused.value)
    assert text.startswith("layer 0, expert 0: no other replica answers: ")
    assert f"{ill.address}: layer 0: CODE_" in text and f"; {NOWHERE}: " in text
    assert probed.entry("new").address not in text


def test_a_new_replica_that_fails_is_named(probed: Probed) -> None:
    with pytest.raises(Unverified, match=f"^{NOWHERE}: "):
        probed.verify(probed.entry("new", address=NOWHERE), probed.entry("old"))


def test_answers_that_differ_name_both(probed: Probed) -> None:
    probed.start("liar", executor=Liar())
    new, old = probed.entry("liar"), probed.entry("old")
    with pytest.raises(Unverified) as refused:
        probed.verify(new, old)
    text = str(refused.value)
    assert text.startswith(f"replica {new.replica_id} at {new.address}: layer 0, expert 0: its answer differs from ")
    assert f"that of {old.address} by " in text
