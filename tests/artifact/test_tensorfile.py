"""Our safetensors reader and writer agree with the safetensors package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from expertmesh.artifact.tensorfile import FLOAT_CODES, TensorFileWriter, file_digest, read_entries, read_tensor
from expertmesh.errors import ArtifactError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.arange(5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4, dtype=torch.float16),
}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    with TensorFileWriter(path, {name: (FLOAT_CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}) as file:
        for tensor in tensors.values():
            file.write_tensor(tensor)
        return file.commit()


def test_what_is_written_the_package_reads(tmp_path: Path) -> None:
    digest = write(tmp_path / "t.safetensors", TENSORS)
    assert digest == file_digest(tmp_path / "t.safetensors")
    read = load_file(tmp_path / "t.safetensors")
    assert set(read) == set(TENSORS) and all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


def test_what_the_package_writes_is_read_whole_and_in_rows(tmp_path: Path) -> None:
    tensor = torch.randn(7, 3, 2)
    save_file({"x": tensor, "y": torch.ones(3, dtype=torch.int64)}, tmp_path / "t.safetensors")
    entry = read_entries(tmp_path / "t.safetensors")["x"]
    assert torch.equal(read_tensor(entry), tensor)
    assert torch.equal(read_tensor(entry, 2, 4), tensor[2:6])


def test_a_file_that_is_not_committed_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TensorFileWriter(tmp_path / "t.safetensors", {"x": ("F32", (4,))}) as file:
        file.write_tensor(torch.ones(2))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "corrupt header"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "overlap or leave a gap"),
        ({"x": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, "unknown dtype F99"),
        ({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}, "truncated"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "corrupt: "),
        ({"x": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, "corrupt header"),
        ({"x": 3}, "corrupt header"),
        ([], "corrupt header"),
    ],
)
def test_headers_that_lie(header: object, reason: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "t.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ArtifactError, match=reason):
        read_entries(tmp_path / "t.safetensors")


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, 400), noise=st.binary(min_size=1, max_size=8))
def test_any_damage_is_an_artifact_error_or_harmless(position: int, noise: bytes, tmp_path: Path) -> None:
    write(tmp_path / "t.safetensors", TENSORS)
    data = bytearray((tmp_path / "t.safetensors").read_bytes())
    data[position : position + len(noise)] = noise
    (tmp_path / "t.safetensors").write_bytes(data)
    try:
        entries = read_entries(tmp_path / "t.safetensors")
    except ArtifactError as error:
        assert str(tmp_path) in str(error)
    else:
        assert sum(entry.size for entry in entries.values()) <= len(data)
