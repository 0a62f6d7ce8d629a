"""A Hugging Face checkpoint -> an artifact, in steps of a few experts that are verified as they are written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from expertmesh.artifact.checkpoint import CONFIG_FILE, INDEX_FILE
from expertmesh.artifact.experts import map_experts
from expertmesh.artifact.journal import JOURNAL_FILE, Journal, locked, open_journal, write_text
from expertmesh.artifact.manifest import (
    EXPERTS_DIRECTORY,
    MANIFEST_FILE,
    QUANT_METHOD,
    TRUNK_DIRECTORY,
    Manifest,
    experts_file,
    read_manifest,
)
from expertmesh.artifact.modules import ExpertLayer
from expertmesh.artifact.plan import Plan, make_plan
from expertmesh.artifact.reader import ExpertReader
from expertmesh.artifact.tensorfile import TensorFileWriter, read_blocks
from expertmesh.artifact.verify import verify_experts
from expertmesh.errors import ArtifactError

STEP_BYTES = 8 * 2**20
"""Experts that are converted, written and verified together take at most this, or are one expert."""


@dataclass(frozen=True)
class PrepareProgress:
    """Reported after every step, and for every file that an earlier run had finished."""

    state: Literal["written", "kept", "complete"]
    """`kept`: a file of an earlier run, found whole; `complete`: the artifact is finished."""
    what: str
    """A path within the artifact; its own path where it is complete."""
    bytes_done: int
    bytes_total: int
    """Of all experts and the trunk."""


Progress = Callable[[PrepareProgress], None]


def prepare(source: Path, destination: Path, *, progress: Progress | None = None) -> Manifest:
    """Makes the artifact of `source`, a checkpoint directory, at `destination` and returns its manifest.

    A destination that an interrupted `prepare` of the same source left is continued and a finished one is left as it
    is; any other is refused. Memory does not grow with the model: a few times STEP_BYTES or one expert, whichever is
    more; one layer's experts where transformers converts a layer's tensors as a whole. Raises ArtifactError: before
    anything is written where config and headers show the fault, and otherwise with what was written removed.
    """
    plan = make_plan(source)
    try:
        journal = open_journal(destination, plan.identity())
        if journal.is_complete(destination):
            return _finish(plan, destination, progress)
        _check_room(plan, destination, journal)
        destination.mkdir(parents=True, exist_ok=True)
        with locked(destination):
            return _Writing(plan, destination, journal, progress).run()
    except OSError as error:
        raise ArtifactError(f"{error.filename or destination}: {error.strerror or error}") from None


def _finish(plan: Plan, destination: Path, progress: Progress | None) -> Manifest:
    if progress:
        progress(PrepareProgress("complete", str(destination), plan.total_bytes, plan.total_bytes))
    return read_manifest(destination)


def _check_room(plan: Plan, destination: Path, journal: Journal) -> None:
    existing = next(path for path in (destination, *destination.absolute().parents) if path.exists())
    needed = plan.total_bytes - sum(known.size for known in journal.files.values())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ArtifactError(f"{destination}: needs {needed / 2**30:.1f} GiB, its disk has {free / 2**30:.1f} GiB free")


class _Writing:
    """One run of writing one artifact."""

    def __init__(self, plan: Plan, destination: Path, journal: Journal, progress: Progress | None) -> None:
        self._plan = plan
        self._destination = destination
        self._trunk = destination / TRUNK_DIRECTORY
        self._journal = journal
        self._progress = progress
        self._bytes_done = 0

    def run(self) -> Manifest:
        try:
            self._begin()
            for layer in self._plan.layers:
                self._write_layer(layer)
            for name, tensors in self._plan.shards.items():
                self._write_shard(self._trunk / name, tensors)
        except ArtifactError as error:
            self._remove()
            raise ArtifactError(f"{self._plan.checkpoint.where}: {error}") from None
        manifest = Manifest(**self._plan.description(), fingerprint=self._fingerprint())
        self._write_side_files(manifest)
        write_text(self._destination / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
        return _finish(self._plan, self._destination, self._progress)

    def _begin(self) -> None:
        (self._destination / MANIFEST_FILE).unlink(missing_ok=True)
        self._journal.save(self._destination)
        (self._destination / EXPERTS_DIRECTORY).mkdir(exist_ok=True)
        self._trunk.mkdir(exist_ok=True)

    def _remove(self) -> None:
        (self._destination / JOURNAL_FILE).unlink(missing_ok=True)
        shutil.rmtree(self._destination / EXPERTS_DIRECTORY)
        shutil.rmtree(self._trunk)
        self._destination.rmdir()

    def _write_layer(self, layer: ExpertLayer) -> None:
        plan, path = self._plan, experts_file(self._destination, layer.index)
        if self._keep(path, layer.num_experts * plan.expert_bytes):
            return
        reader = ExpertReader(plan, layer)
        step = max(1, STEP_BYTES // plan.expert_bytes)
        with TensorFileWriter(path, plan.experts_layout(layer)) as file:
            for first in range(0, layer.num_experts, step):
                indices = range(first, min(first + step, layer.num_experts))
                parameters = reader.read(indices)
                for expert in layer.split(parameters):
                    for tensor in expert.tensors().values():
                        file.write_tensor(tensor)
                written = map_experts(file.partial, plan.expert_shapes, plan.dtype, indices)
                verify_experts(layer, parameters, indices, list(written.values()), plan.function)
                self._report("written", path, len(indices) * plan.expert_bytes)
            self._journal.add(self._destination, path, file.commit())

    def _write_shard(self, path: Path, names: list[str]) -> None:
        entries = {name: self._plan.checkpoint.tensors[name] for name in names}
        if self._keep(path, sum(entry.size for entry in entries.values())):
            return
        with TensorFileWriter(path, {name: (entry.dtype, entry.shape) for name, entry in entries.items()}) as file:
            for entry in entries.values():
                file.write(read_blocks(entry))
                self._report("written", path, entry.size)
            self._journal.add(self._destination, path, file.commit())

    def _keep(self, path: Path, size: int) -> bool:
        if not self._journal.is_finished(self._destination, path):
            return False
        self._report("kept", path, size)
        return True

    def _report(self, state: Literal["written", "kept"], path: Path, size: int) -> None:
        self._bytes_done += size
        if self._progress:
            what = str(path.relative_to(self._destination))
            self._progress(PrepareProgress(state, what, self._bytes_done, self._plan.total_bytes))

    def _fingerprint(self) -> str:
        description = self._plan.description()
        description.pop("name")
        files = {name: known.sha256 for name, known in self._journal.files.items()}
        text = json.dumps([description, self._plan.checkpoint.config, files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _write_side_files(self, manifest: Manifest) -> None:
        source, trunk = self._plan.checkpoint, self._trunk
        for name in source.side_files():
            (trunk / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.directory / name, trunk / name)
        weight_map = {name: shard for shard, names in self._plan.shards.items() for name in names}
        if len(self._plan.shards) > 1:
            index = {"metadata": {"total_size": self._plan.trunk_bytes}, "weight_map": weight_map}
            write_text(trunk / INDEX_FILE, json.dumps(index, indent=2) + "\n")
        config = {key: value for key, value in source.config.items() if key != "auto_map"}
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format_version": manifest.format_version,
            "fingerprint": manifest.fingerprint,
        }
        write_text(trunk / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
