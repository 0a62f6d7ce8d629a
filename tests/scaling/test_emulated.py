"""The emulated device: the right answer, and no sooner than the modelled accelerator would have it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy
import pydantic
import pytest
import torch
from mesh import TRANSPORTS, group_args, running_directory, running_dispatcher

from expert_service.choice import build_executor
from expert_service.emulated import EmulatedExecutor
from expert_service.executor import Pairs
from expert_service.replica import Replica
from expert_service.weights import hold_experts
from expertmesh.artifact.manifest import Manifest, read_manifest
from expertmesh.config import EmulatedDevice, GroupSection
from expertmesh.scaling.emulation import ExpertCost, batch_s, expert_cost

CPU = torch.device("cpu")
ROWS = 12


def pairs(manifest: Manifest, experts: int) -> Pairs:
    chance = numpy.random.default_rng(0)
    rows = numpy.repeat(numpy.arange(ROWS, dtype=numpy.int32), manifest.top_k)
    chosen = [chance.choice(experts, manifest.top_k, replace=False) for _ in range(ROWS)]
    weights = chance.random(len(rows), dtype=numpy.float32)
    return Pairs(rows, numpy.concatenate(chosen).astype(numpy.int32), weights)


def test_answers_are_bit_identical_and_no_sooner_than_modelled(demo_artifact: Path) -> None:
    manifest = read_manifest(demo_artifact)
    layer, count = next(iter(manifest.layers.items()))
    held = hold_experts(demo_artifact, manifest, {layer: frozenset(range(count))})
    device = EmulatedDevice(teraflops=1e-4, memory_gb_per_s=1.0, overhead_us=5000)
    real, emulated = build_executor(held, CPU), build_executor(held, CPU, emulated=device)
    assert isinstance(emulated, EmulatedExecutor)
    batch = pairs(manifest, count)
    hidden_states = torch.randn(ROWS, manifest.hidden_size, generator=torch.Generator().manual_seed(0))
    began = time.monotonic()
    answer = emulated.run(layer, hidden_states, batch)
    took_s = time.monotonic() - began
    assert torch.equal(answer, real.run(layer, hidden_states, batch))
    touched = len(set(batch.experts.tolist()))
    assert took_s >= batch_s(device, expert_cost(manifest), len(batch.experts), touched)


def test_the_roofline() -> None:
    device = EmulatedDevice(teraflops=1.0, memory_gb_per_s=1.0, overhead_us=10)
    cost = ExpertCost(flops_per_pair=1e9, weight_bytes=1e6, row_bytes=0.0)
    assert batch_s(device, cost, pairs=1, experts=1) == pytest.approx(1e-3 + 1e-5)
    assert batch_s(device, cost, pairs=5, experts=5) == pytest.approx(5e-3 + 1e-5), "bound by memory"
    assert batch_s(device, cost, pairs=50, experts=5) == pytest.approx(50e-3 + 1e-5), "bound by arithmetic"
    assert batch_s(device, cost, pairs=0, experts=0) == pytest.approx(1e-5)


def test_the_cost_of_an_expert(demo_artifact: Path) -> None:
    manifest = read_manifest(demo_artifact)
    cost = expert_cost(manifest)
    matrices = 3 if manifest.expert_function.gated else 2
    assert cost.flops_per_pair == 2 * matrices * manifest.hidden_size * manifest.intermediate_size
    assert cost.weight_bytes == manifest.expert_bytes


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_replica_with_an_emulated_device_is_busy_while_it_waits(demo_artifact: Path, transport: str) -> None:
    manifest = read_manifest(demo_artifact)
    layer, count = next(iter(manifest.layers.items()))
    device = {"teraflops": 1.0, "memory_gb_per_s": 100.0, "overhead_us": 200_000}
    chosen = torch.arange(2 * ROWS, dtype=torch.int32).reshape(ROWS, 2) % count
    hidden_states = torch.randn(ROWS, manifest.hidden_size).to(manifest.torch_dtype)
    weights = torch.full((ROWS, 2), 0.5)
    with running_directory() as directory:
        answers = []
        for emulated in (None, device):
            args = group_args(demo_artifact, directory, "a", set(range(count)), emulated=emulated, transport=transport)
            replica = Replica(args, directory)
            try:
                with running_dispatcher(demo_artifact, directory, transport) as dispatcher:
                    answers += [
                        dispatcher.finish(dispatcher.start(layer, hidden_states, chosen, weights)) for _ in range(5)
                    ]
                    busy = replica.load().busy
                assert replica.load().rows_total == 5 * ROWS
            finally:
                replica.drain(1.0)
                replica.stop()
        assert all(torch.equal(answers[0], answer) for answer in answers)
        assert busy > 0.05, "5 x 0.2 s until just now"


def test_an_emulated_device_is_for_cpus() -> None:
    with pytest.raises(pydantic.ValidationError, match="group a: emulated is for CPUs, num_gpus is 1"):
        GroupSection.model_validate(
            {"name": "a", "experts": "0", "num_gpus": 1, "emulated": {"teraflops": 1, "memory_gb_per_s": 1}}
        )
