from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from expertmesh.artifact.manifest import MANIFEST_FILE, ExpertFunction, Manifest, experts_file


def expert_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    hidden, inner = manifest.hidden_size, manifest.intermediate_size
    function = manifest.expert_function
    outer = 2 * inner if function.gated else inner
    shapes: dict[str, tuple[int, ...]] = {"gate_up": (outer, hidden), "down": (hidden, inner)}
    return shapes | ({"gate_up_bias": (outer,), "down_bias": (hidden,)} if function.bias else {})


WriteArtifact = Callable[..., Path]


@pytest.fixture(scope="session")
def write_artifact(tmp_path_factory: pytest.TempPathFactory) -> WriteArtifact:
    """Writes an artifact of random experts without a trunk; keywords override the manifest's fields."""

    def write(**overrides: Any) -> Path:
        path = tmp_path_factory.mktemp("artifact")
        fields = {
            "name": "random",
            "architecture": "None",
            "model_type": "none",
            "hidden_size": 16,
            "intermediate_size": 24,
            "layers": {1: 6, 3: 4},
            "top_k": 2,
            "dtype": "float32",
            "expert_function": ExpertFunction(activation="silu"),
            "fingerprint": "f" * 16,
            "expert_bytes": 1,
        }
        manifest = Manifest.model_validate(fields | overrides)
        (path / "experts").mkdir()
        (path / MANIFEST_FILE).write_text(manifest.model_dump_json())
        generator = torch.Generator().manual_seed(0)
        for layer, count in manifest.layers.items():
            tensors = {
                f"{index}.{name}": (torch.randn(shape, generator=generator) * 0.3).to(manifest.torch_dtype)
                for index in range(count)
                for name, shape in expert_shapes(manifest).items()
            }
            save_file(tensors, experts_file(path, layer))
        return path

    return write


@pytest.fixture(scope="session")
def artifact(write_artifact: WriteArtifact) -> Path:
    return write_artifact()
