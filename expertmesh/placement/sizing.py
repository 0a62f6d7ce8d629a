"""What a model needs at all: its parameters decide memory, those that a token uses decide compute."""

from __future__ import annotations

from pathlib import Path

import pydantic

from expertmesh.artifact.manifest import TRUNK_DIRECTORY, Manifest
from expertmesh.config import EmulatedDevice, Section
from expertmesh.coverage import GIB
from expertmesh.placement.shapes import Shape
from expertmesh.scaling.emulation import batch_s, expert_cost

EMBEDDING_BYTES = 2


class Sizing(Section):
    model: str
    experts_gib: float = pydantic.Field(description="All experts once.")
    expert_mib: float = pydantic.Field(description="One expert of one layer.")
    trunk_gib: float | None = pydantic.Field(description="None where it is not known.")
    expert_gflops_per_token: float = pydantic.Field(description="Of the top_k experts of every layer, 10^9.")
    trunk_gflops_per_token: float | None = pydantic.Field(
        description="Of its matrices, without scores over the context; None where it is not known."
    )
    total_parameters: float | None = None
    active_parameters: float | None = pydantic.Field(None, description="Without the embedding, which is looked up.")


def size_of_artifact(manifest: Manifest, artifact: Path) -> Sizing:
    files = list((artifact / TRUNK_DIRECTORY).glob("*.safetensors"))
    trunk_bytes = float(sum(file.stat().st_size for file in files)) if files else None
    return _sizing(manifest, trunk_bytes)


def size_of_shape(manifest: Manifest, shape: Shape) -> Sizing:
    weights = 3 * shape.hidden * shape.intermediate * shape.layers
    if shape.trunk is None:
        return _sizing(manifest, None)
    embedding = shape.trunk.vocabulary * shape.hidden
    matrices = trunk_matrices(shape)
    trunk_bytes = (matrices - embedding) * shape.trunk.bytes_per_weight + 2 * embedding * EMBEDDING_BYTES
    return _sizing(manifest, trunk_bytes).model_copy(
        update={
            "trunk_gflops_per_token": 2 * matrices / 1e9,
            "total_parameters": float(weights * shape.experts + matrices + embedding),
            "active_parameters": float(weights * shape.top_k + matrices),
        }
    )


def trunk_matrices(shape: Shape) -> int:
    """Parameters of the trunk's products for one token: attention, gates, shared and dense parts, LM head."""
    trunk = shape.trunk
    if trunk is None:
        return 0
    attention = trunk.attention or trunk.latent_attention
    per_layer = attention.parameters(shape.hidden) if attention else 0
    moe = shape.layers * (shape.hidden * shape.experts + 3 * shape.hidden * trunk.shared_intermediate)
    dense = trunk.dense_layers * 3 * shape.hidden * trunk.dense_intermediate
    return (shape.layers + trunk.dense_layers) * per_layer + moe + dense + trunk.vocabulary * shape.hidden


def roofline_rows_per_s(device: EmulatedDevice, manifest: Manifest, pairs: int) -> float:
    """Rows/s that a modelled device sustains in batches of `pairs` (row, expert) pairs, each for another expert where
    there are so many: the worst case for memory."""
    touched = min(pairs, max(manifest.layers.values()))
    return pairs / batch_s(device, expert_cost(manifest), pairs, touched)


def sizing_text(sizing: Sizing) -> str:
    """A paragraph for people."""
    trunk = "not known from these numbers" if sizing.trunk_gib is None else f"{sizing.trunk_gib:,.2f} GiB"
    flops = f"{sizing.expert_gflops_per_token:,.3g} GFLOP in experts"
    if sizing.trunk_gflops_per_token is not None:
        flops += f" and {sizing.trunk_gflops_per_token:,.3g} in the trunk, without attention over its context"
    lines = [
        f"{sizing.model}: total parameters decide memory, active parameters decide compute.",
        f"Experts {sizing.experts_gib:,.2f} GiB ({sizing.expert_mib:,.3g} MiB each), trunk {trunk}.",
        f"One token takes {flops}.",
    ]
    if sizing.total_parameters is not None and sizing.active_parameters is not None:
        billions = f"{sizing.total_parameters / 1e9:,.1f} billion parameters, {sizing.active_parameters / 1e9:,.1f}"
        lines.insert(1, f"It has {billions} billion of them active per token.")
    return "\n".join(lines)


def _sizing(manifest: Manifest, trunk_bytes: float | None) -> Sizing:
    experts = sum(manifest.layers.values())
    per_pair = expert_cost(manifest).flops_per_pair
    return Sizing(
        model=manifest.name,
        experts_gib=experts * manifest.expert_bytes / GIB,
        expert_mib=manifest.expert_bytes / 2**20,
        trunk_gib=None if trunk_bytes is None else trunk_bytes / GIB,
        expert_gflops_per_token=per_pair * manifest.top_k * len(manifest.layers) / 1e9,
        trunk_gflops_per_token=None,
    )
