"""Each router's transport against each replica's server: Python and native, over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from certificates import Authority
from marks import needs_native
from mesh import divide, group_args, running_directory
from tiny_models import EXPERTS, make_checkpoint

from expert_service.replica import Replica
from expertmesh.artifact.manifest import read_manifest
from expertmesh.artifact.prepare import prepare
from expertmesh.wire.tls import TlsFiles
from router_service.connection import RouterSettings, open_transport
from router_service.dispatcher import Dispatcher
from router_service.replicas import LiveReplicas

PAIRINGS = [
    pytest.param("python", "python", id="python-to-python"),
    pytest.param("python", "native", id="python-to-native", marks=needs_native),
    pytest.param("native", "python", id="native-to-python", marks=needs_native),
    pytest.param("native", "native", id="native-to-native", marks=needs_native),
]
pytestmark = pytest.mark.parametrize(("router", "server"), PAIRINGS)
LAYER, HIDDEN = 0, 64


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairings")
    prepare(make_checkpoint("mixtral", folder / "checkpoint"), folder / "artifact")
    return folder / "artifact"


@pytest.fixture
def directory() -> Iterator[str]:
    with running_directory() as address:
        yield address


@contextmanager
def mesh(
    artifact: Path, directory: str, router: str, server: str, groups: list[set[int]], tls: TlsFiles | None = None,
    checksums: bool = False, **more: object,
) -> Iterator[tuple[Dispatcher, list[Replica]]]:  # fmt: skip
    """A dispatcher and one replica per group."""
    settings = RouterSettings.model_validate(
        {"directory": directory, "transport": router, "tls": tls, "checksums": checksums}
    )
    live = LiveReplicas()
    with ExitStack() as stack:
        transport = open_transport(settings, read_manifest(artifact).fingerprint, live)
        stack.callback(transport.close)
        replicas = []
        for number, experts in enumerate(groups):
            args = group_args(artifact, directory, f"g{number}", experts, transport=server, tls=tls, **more)
            replicas.append(Replica(args, directory))
            stack.callback(replicas[-1].stop)
        deadline = time.monotonic() + 30
        while len(seen := live.snapshot()) < len(groups):
            assert time.monotonic() < deadline, live.refused
            live.wait_for_change(seen, 1.0)
        yield Dispatcher(live, transport, 30), replicas


def routed(tokens: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(tokens)])
    hidden_states = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    return hidden_states, ids, torch.rand(tokens, 2, generator=generator)


def step(made: Dispatcher, tokens: int = 9, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return made.finish(made.start(LAYER, *routed(tokens, dtype, seed)))


STEPS = [(9, torch.float32), (1, torch.bfloat16), (300, torch.bfloat16), (17, torch.float16), (4000, torch.float32)]


@pytest.fixture(scope="module")
def reference(artifact: Path) -> list[torch.Tensor]:
    """What Python to Python gives."""
    with running_directory() as address, mesh(artifact, address, "python", "python", divide(EXPERTS, 3)) as (made, _):
        return [step(made, tokens, dtype, seed) for seed, (tokens, dtype) in enumerate(STEPS)]


def test_every_pairing_gives_the_same_bits(
    artifact: Path, directory: str, reference: list[torch.Tensor], router: str, server: str
) -> None:
    with mesh(artifact, directory, router, server, divide(EXPERTS, 3)) as (made, replicas):
        for seed, (tokens, dtype) in enumerate(STEPS):
            assert torch.equal(step(made, tokens, dtype, seed), reference[seed]), (tokens, dtype)
        assert all(replica.load().rows_total for replica in replicas)
        assert not any(replica.endpoint.streams().waiting for replica in replicas)


def test_checksums_agree_in_every_pairing(
    artifact: Path, directory: str, reference: list[torch.Tensor], router: str, server: str
) -> None:
    """Messages in one slice and in many: each end finds the other's checksums right, and nothing is sent twice."""
    with mesh(artifact, directory, router, server, divide(EXPERTS, 3), checksums=True) as (made, _):
        for seed, (tokens, dtype) in enumerate(STEPS):
            assert torch.equal(step(made, tokens, dtype, seed), reference[seed]), (tokens, dtype)
        assert made.counters.resent_rows == 0 and not made.replicas.suspensions()["since_start"]


def test_rows_cross_under_tls(
    artifact: Path, directory: str, tmp_path: Path, reference: list[torch.Tensor], router: str, server: str
) -> None:
    tls = Authority(tmp_path).issue()
    with mesh(artifact, directory, router, server, divide(EXPERTS, 3), tls) as (made, _):
        assert torch.equal(step(made, *STEPS[0], seed=0), reference[0])


def test_small_limits_split_and_push_back_but_lose_nothing(
    artifact: Path, directory: str, reference: list[torch.Tensor], router: str, server: str
) -> None:
    """Four rows may wait: a message holds no more, and what comes on top is refused and sent again."""
    with mesh(artifact, directory, router, server, divide(EXPERTS, 3), max_queued_rows=4) as (made, _):
        torch.testing.assert_close(step(made, *STEPS[0], seed=0), reference[0], atol=1e-6, rtol=1e-6)


def test_steps_of_many_threads_do_not_mix(artifact: Path, directory: str, router: str, server: str) -> None:
    with mesh(artifact, directory, router, server, divide(EXPERTS, 2)) as (made, _):
        alone = [step(made, seed=seed) for seed in range(32)]
        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(lambda seed: step(made, seed=seed), range(32)))
    for expected, got in zip(alone, together, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_a_replica_that_stops_while_rows_flow_loses_none(
    artifact: Path, directory: str, router: str, server: str
) -> None:
    everything = set(range(EXPERTS))
    with mesh(artifact, directory, router, server, [everything, everything]) as (made, replicas):
        expected = step(made)
        stopper = threading.Timer(0.05, replicas[1].stop)
        stopper.start()
        steps = 0
        while stopper.is_alive() or steps < 50:
            torch.testing.assert_close(step(made), expected, atol=1e-6, rtol=1e-6)
            steps += 1
        assert replicas[1].load().rows_total > 0
