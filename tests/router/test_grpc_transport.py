"""The router's side of the wire against real replicas and a real directory, on loopback."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mesh import TRANSPORTS, group_args, running_directory, running_dispatcher, running_groups
from tiny_models import EXPERTS, make_checkpoint

from expert_service.replica import Replica
from expertmesh.artifact.experts import load_experts
from expertmesh.artifact.function import expert_forward
from expertmesh.artifact.manifest import MANIFEST_FILE, read_manifest
from expertmesh.artifact.prepare import prepare
from router_service.dispatcher import Dispatcher
from router_service.recovery import ExpertsUnavailable

LAYER = 0
TOKENS = 9


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transport")
    prepare(make_checkpoint("mixtral", folder / "checkpoint"), folder / "artifact")
    return folder / "artifact"


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def directory() -> Iterator[str]:
    with running_directory() as address:
        yield address


def routed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden_states [T, H], topk_ids [T, 2], topk_weights [T, 2]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(TOKENS)])
    return torch.randn(TOKENS, 64, generator=generator), ids, torch.rand(TOKENS, 2, generator=generator)


def dense(artifact: Path, hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    manifest = read_manifest(artifact)
    experts = load_experts(artifact, manifest, LAYER, range(EXPERTS))
    outputs = [expert_forward(hidden_states, experts[index], manifest.expert_function) for index in range(EXPERTS)]
    stacked = torch.stack(outputs, dim=1)
    return (stacked[torch.arange(TOKENS)[:, None], ids] * weights[..., None]).sum(1)


def check(dispatcher: Dispatcher, artifact: Path, seed: int = 0) -> None:
    hidden_states, ids, weights = routed(seed)
    result = dispatcher.finish(dispatcher.start(LAYER, hidden_states, ids, weights))
    torch.testing.assert_close(result, dense(artifact, hidden_states, ids, weights), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 3, 8])
def test_the_sum_over_groups_is_the_dense_result(artifact: Path, directory: str, groups: int, transport: str) -> None:
    with (
        running_groups(artifact, directory, groups) as replicas,
        running_dispatcher(artifact, directory, transport) as dispatcher,
    ):
        for seed in range(5):
            check(dispatcher, artifact, seed)
        assert all(replica.load().rows_total for replica in replicas)


def test_a_replica_of_another_model_is_refused_and_named(
    artifact: Path, directory: str, tmp_path: Path, transport: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for item in ("experts", "trunk"):
        (other / item).symlink_to(artifact / item)
    manifest = json.loads((artifact / MANIFEST_FILE).read_text())
    (other / MANIFEST_FILE).write_text(json.dumps(manifest | {"fingerprint": "0" * 64}))
    with (
        running_groups(other, directory, 1) as replicas,
        running_dispatcher(artifact, directory, transport) as dispatcher,
    ):
        short = Dispatcher(dispatcher.replicas, dispatcher.transport, wait_s=3.0)
        reason = rf"within 3 s; {replicas[0].address} refused: serves model 000000000000, this router's is"
        with pytest.raises(ExpertsUnavailable, match=reason):
            check(short, artifact)
        assert replicas[0].load().rows_total == 0


def test_a_stopped_replica_s_rows_go_to_another_of_the_same_experts(
    artifact: Path, directory: str, transport: str
) -> None:
    with (
        running_groups(artifact, directory, 1) as twins,
        running_dispatcher(artifact, directory, transport) as dispatcher,
    ):
        second = Replica(group_args(artifact, directory, "g0", set(range(EXPERTS))), directory)
        wait_for(dispatcher, 2)
        second.stop()
        for seed in range(10):
            check(dispatcher, artifact, seed)
        assert twins[0].load().rows_total > 0


def test_two_replicas_of_a_group_share_the_rows_of_one_router(artifact: Path, directory: str, transport: str) -> None:
    with (
        running_groups(artifact, directory, 1) as twins,
        running_dispatcher(artifact, directory, transport) as dispatcher,
    ):
        second = Replica(group_args(artifact, directory, "g0", set(range(EXPERTS))), directory)
        try:
            wait_for(dispatcher, 2)
            for seed in range(10):
                check(dispatcher, artifact, seed)
            assert twins[0].load().rows_total >= 3 * TOKENS and second.load().rows_total >= 3 * TOKENS
        finally:
            second.stop()


def test_groups_are_replaced_while_rows_flow(artifact: Path, directory: str, transport: str) -> None:
    """Rebalancing needs no epoch: the new groups are used once they are there, the old ones drain and go."""
    with running_dispatcher(artifact, directory, transport) as dispatcher:
        for groups in (1, 4, 2):
            with running_groups(artifact, directory, groups) as replicas:
                wait_for(dispatcher, groups, of={replica.replica_id for replica in replicas})
                check(dispatcher, artifact, groups)
                for replica in replicas:
                    replica.drain(1.0)
                assert dispatcher.replicas.candidates(LAYER) == [] or wait_for(dispatcher, 0)


def test_a_full_queue_pushes_back_and_nothing_is_lost(artifact: Path, directory: str, transport: str) -> None:
    replica = Replica(group_args(artifact, directory, "g0", set(range(EXPERTS)), max_queued_rows=4), directory)
    try:
        with running_dispatcher(artifact, directory, transport) as dispatcher:
            for seed in range(5):
                check(dispatcher, artifact, seed)
    finally:
        replica.stop()


def wait_for(dispatcher: Dispatcher, replicas: int, of: set[str] | None = None, timeout_s: float = 20.0) -> bool:
    """Until the dispatcher may use that many replicas (of those named)."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        usable = {one.replica for one in dispatcher.replicas.candidates(LAYER)}
        if len(usable if of is None else usable & of) == replicas:
            return True
        time.sleep(0.02)
    raise AssertionError(f"{len(usable)} usable replicas, not {replicas}")
