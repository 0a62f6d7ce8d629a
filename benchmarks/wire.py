"""The expert tier that the wire's benchmarks use: a directory, echoing replicas and a dispatcher that follows them."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.echo import peers
from expertmesh.artifact.manifest import MANIFEST_FILE, ExpertFunction, Manifest, experts_file
from expertmesh.errors import ClusterError
from expertmesh.experts import format_indices
from router_service.connection import RouterSettings, open_transport
from router_service.dispatcher import Dispatcher
from router_service.replicas import LiveReplicas

HIDDEN = 512
EXPERTS = 16
TOP_K = 2
COUNTS = (1, 2, 4, 8, 16)
"""Numbers of replicas that may share the experts: in layer 0 one replica has them all, in layer 1 two, and so on, so
that the same processes serve every count and counts can take turns."""
READY_S = 60.0
TRANSPORTS = ("native", "python") if importlib.util.find_spec("expertmesh_native") else ("python",)
"""Those that are there; the first is the one that a cluster would use."""


def layer_of(count: int) -> int:
    """The layer whose experts `count` replicas share."""
    return COUNTS.index(count)


def experts_of(number: int) -> dict[int, str]:
    """What replica `number` holds in each layer."""
    bounds = {
        layer: (EXPERTS * number // count, EXPERTS * (number + 1) // count)
        for layer, count in enumerate(COUNTS)
        if number < count
    }
    return {layer: format_indices(set(range(*both))) for layer, both in bounds.items()}


def make_artifact(folder: Path) -> Manifest:
    """Experts as small as can be, since nobody computes them; hidden 512, bf16, top-2."""
    manifest = Manifest(
        name="echo",
        architecture="None",
        model_type="none",
        hidden_size=HIDDEN,
        intermediate_size=1,
        layers=dict.fromkeys(range(len(COUNTS)), EXPERTS),
        top_k=TOP_K,
        dtype="bfloat16",
        expert_function=ExpertFunction(activation="silu"),
        fingerprint="e" * 64,
        expert_bytes=3 * HIDDEN * 2,
    )
    (folder / "experts").mkdir()
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    zeros = {"gate_up": torch.zeros(2, HIDDEN), "down": torch.zeros(HIDDEN, 1)}
    tensors = {f"{index}.{name}": zero.bfloat16() for index in range(EXPERTS) for name, zero in zeros.items()}
    for layer in manifest.layers:
        save_file(tensors, experts_file(folder, layer))
    return manifest


def routed(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden_states [T, H] bf16, topk_ids [T, 2] int32, topk_weights [T, 2] fp32: the experts take turns, so that each
    gets as many rows as the next."""
    tokens = torch.arange(rows)
    ids = torch.stack([2 * tokens % EXPERTS, (2 * tokens + 1 + 2 * (2 * tokens // EXPERTS)) % EXPERTS], dim=1)
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(rows, HIDDEN, generator=generator).bfloat16()
    return hidden_states, ids.to(torch.int32), torch.full((rows, TOP_K), 0.5)


@contextlib.contextmanager
def directory() -> Iterator[str]:
    """A directory in a process of its own; yields its address."""
    command = [sys.executable, "-m", "expertmesh.directory"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@contextlib.contextmanager
def replicas(artifact: Path, directory: str, count: int, transport: str, *options: str) -> Iterator[list[str]]:
    """Processes with echoing experts; yields their addresses. The first n share layer `layer_of(n)`."""
    shared = [f"--artifact={artifact}", f"--directory={directory}", f"--transport={transport}", *options]
    with peers("replica", [[*shared, f"--number={number}"] for number in range(count)]) as addresses:
        yield addresses


@contextlib.contextmanager
def dispatcher(
    directory: str, fingerprint: str, count: int, transport: str, checksums: bool = False
) -> Iterator[Dispatcher]:
    """A router's dispatcher that has `count` replicas."""
    live = LiveReplicas()
    settings = RouterSettings.model_validate({"directory": directory, "transport": transport, "checksums": checksums})
    made = open_transport(settings, fingerprint, live)
    try:
        wait_for(live, count)
        yield Dispatcher(live, made)
    finally:
        made.close()


def wait_for(live: LiveReplicas, count: int) -> None:
    deadline = time.monotonic() + READY_S
    while len(seen := live.snapshot()) < count:
        if time.monotonic() > deadline:
            raise ClusterError(f"{len(seen)} of {count} replicas within {READY_S:.0f} s; {live.refused}")
        live.wait_for_change(seen, 1.0)


def step(made: Dispatcher, count: int, routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What a MoE layer whose experts `count` replicas share does: scatter, wait, combine."""
    return made.finish(made.start(layer_of(count), *routed))
