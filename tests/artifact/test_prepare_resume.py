"""Interrupted runs are continued, finished ones left alone, anything else refused."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import make_checkpoint

from expertmesh.artifact.manifest import MANIFEST_FILE, experts_file, read_manifest
from expertmesh.artifact.prepare import PrepareProgress, prepare
from expertmesh.errors import ArtifactError


class Interrupted(Exception):
    pass


def interrupt_at(what: str) -> Callable[[PrepareProgress], None]:
    def progress(step: PrepareProgress) -> None:
        if step.what == what:
            raise Interrupted

    return progress


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path / "source")


def snapshot(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_an_interrupted_run_goes_on_where_it_stopped(source: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    with pytest.raises(Interrupted):
        prepare(source, artifact, progress=interrupt_at("experts/layer-00002.safetensors"))
    with pytest.raises(ArtifactError, match="no artifact here"):
        read_manifest(artifact)
    assert [path.name for path in artifact.rglob("*.safetensors")].count("layer-00002.safetensors") == 0
    assert not list(artifact.rglob("*.partial"))
    before = snapshot(artifact / "experts")

    steps: list[PrepareProgress] = []
    manifest = prepare(source, artifact, progress=steps.append)
    assert [step.what for step in steps if step.state == "kept"] == [
        "experts/layer-00000.safetensors",
        "experts/layer-00001.safetensors",
    ]
    assert len(before) == 2 and before.items() <= snapshot(artifact / "experts").items()
    assert steps[-1].state == "complete" and steps[-1].bytes_done == steps[-2].bytes_done == steps[-1].bytes_total
    assert manifest == prepare(source, tmp_path / "at_once")


def test_a_finished_file_that_was_damaged_is_written_again(source: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    with pytest.raises(Interrupted):
        prepare(source, artifact, progress=interrupt_at("trunk/model.safetensors"))
    with experts_file(artifact, 1).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    steps: list[PrepareProgress] = []
    manifest = prepare(source, artifact, progress=steps.append)
    assert [step.what for step in steps if step.state == "kept"] == [
        "experts/layer-00000.safetensors",
        "experts/layer-00002.safetensors",
    ]
    assert manifest == prepare(source, tmp_path / "at_once")


def test_a_finished_artifact_is_left_as_it_is(source: Path, tmp_path: Path) -> None:
    first = prepare(source, tmp_path / "artifact")
    before = snapshot(tmp_path / "artifact")
    steps: list[PrepareProgress] = []
    assert prepare(source, tmp_path / "artifact", progress=steps.append) == first
    assert [step.state for step in steps] == ["complete"]
    assert snapshot(tmp_path / "artifact") == before


def test_an_artifact_that_lost_a_file_is_completed(source: Path, tmp_path: Path) -> None:
    first = prepare(source, tmp_path / "artifact")
    experts_file(tmp_path / "artifact", 0).unlink()
    assert prepare(source, tmp_path / "artifact") == first
    assert experts_file(tmp_path / "artifact", 0).is_file()


def test_an_empty_directory_is_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    assert prepare(source, tmp_path / "artifact") == read_manifest(tmp_path / "artifact")


def test_an_artifact_of_another_source_is_refused(source: Path, tmp_path: Path) -> None:
    prepare(make_checkpoint("qwen3_moe", tmp_path / "other", seed=1), tmp_path / "artifact")
    before = snapshot(tmp_path / "artifact")
    with pytest.raises(ArtifactError, match="artifact: exists and was made from another source"):
        prepare(source, tmp_path / "artifact")
    assert snapshot(tmp_path / "artifact") == before


def test_a_changed_source_is_another_source(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        prepare(source, tmp_path / "artifact", progress=interrupt_at("experts/layer-00001.safetensors"))
    make_checkpoint("qwen3_moe", source, seed=2)
    with pytest.raises(ArtifactError, match="from another source or an older state of it"):
        prepare(source, tmp_path / "artifact")


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_destination_that_is_something_else_is_refused(kind: str, source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    if kind == "directory":
        there.mkdir()
        (there / "precious.txt").write_text("mine")
    else:
        there.write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ArtifactError, match=r"there: exists and .*left as it is"):
        prepare(source, there)
    assert snapshot(tmp_path) == before


def test_two_runs_do_not_write_the_same_artifact(source: Path, tmp_path: Path) -> None:
    def meanwhile(step: PrepareProgress) -> None:
        if step.what == "experts/layer-00001.safetensors":
            with pytest.raises(ArtifactError, match="another `prepare` is writing it"):
                prepare(source, tmp_path / "artifact")

    assert prepare(source, tmp_path / "artifact", progress=meanwhile) == read_manifest(tmp_path / "artifact")


def test_a_full_disk_leaves_no_half_file_and_can_be_continued(source: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the trunk passes it, a layer does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (350_000, hard))
    try:
        with pytest.raises(ArtifactError, match=r"artifact: File too large$"):
            prepare(source, tmp_path / "artifact")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    names = {path.name for path in (tmp_path / "artifact").rglob("*") if path.is_file()}
    assert "layer-00002.safetensors" in names
    assert "model.safetensors" not in names and MANIFEST_FILE not in names
    assert not any("partial" in name for name in names)
    assert prepare(source, tmp_path / "artifact") == prepare(source, tmp_path / "at_once")


def test_no_room_is_seen_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(ArtifactError, match=r"artifact: needs 0.0 GiB, its disk has 0.0 GiB free"):
        prepare(source, tmp_path / "deep/artifact")
    assert not (tmp_path / "deep").exists()
