"""The memory that `prepare` takes depends on the experts of a step, not on the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_models import make_checkpoint

from expertmesh.artifact.prepare import STEP_BYTES, prepare


class PeakMemory:
    """Resident bytes of this process above those at the start, at most, as Linux counts them."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._start = self._read("VmRSS")

    def grown(self) -> int:
        return self._read("VmHWM") - self._start

    @staticmethod
    def _read(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    source = make_checkpoint(
        "mixtral",
        tmp_path / "source",
        dtype=torch.bfloat16,
        num_hidden_layers=6,
        hidden_size=512,
        num_attention_heads=8,
        intermediate_size=1024,
    )
    prepare(make_checkpoint("mixtral", tmp_path / "first"), tmp_path / "warm")
    peak = PeakMemory()
    manifest = prepare(source, tmp_path / "artifact")
    grown = peak.grown()
    layer = manifest.layers[0] * manifest.expert_bytes
    assert layer > STEP_BYTES and manifest.expert_bytes < STEP_BYTES
    assert grown < 3 * layer, f"{grown / layer:.1f} layers"

    peak = PeakMemory()
    held = {name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()}
    assert peak.grown() > 5 * layer, "the measure would have shown a whole checkpoint"
    del held
    shutil.rmtree(tmp_path / "source")
    shutil.rmtree(tmp_path / "artifact")
