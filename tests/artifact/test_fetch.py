"""A checkpoint from an object store; a directory stands in for one, by the same interface of pyarrow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.artifact.fetch import fetch
from expertmesh.errors import ArtifactError


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    (store / "part").mkdir(parents=True)
    (store / "config.json").write_text("{}")
    (store / "part" / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    return store


def test_all_files_come_and_none_comes_twice(store: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert fetch(store.as_uri(), target) == 2
    copied = target / "part" / "model.safetensors"
    assert copied.read_bytes() == (store / "part" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in target.rglob("*") if path.is_file()) == ["config.json", "model.safetensors"]
    before = copied.stat().st_mtime_ns
    copied.with_name(".model.safetensors.partial").write_bytes(b"what an interrupted run left")
    (target / "config.json").write_text("{")
    assert fetch(store.as_uri(), target) == 2
    assert copied.stat().st_mtime_ns == before
    assert (target / "config.json").read_text() == "{}"


@pytest.mark.parametrize(("name", "said"), [("missing", "missing"), ("empty", "no files there")])
def test_nothing_there(store: Path, tmp_path: Path, name: str, said: str) -> None:
    (store / "empty").mkdir()
    with pytest.raises(ArtifactError, match=said) as caught:
        fetch((store / name).as_uri(), tmp_path / "target")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("arguments", [("nothing://bucket/x", "target"), ("only-one",)])
def test_as_the_chart_runs_it(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "expertmesh.artifact.fetch", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
