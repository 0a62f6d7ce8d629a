"""What `expertmesh plan` works from: a model with its config, its loads, and what one replica sustains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expertmesh.artifact.manifest import Manifest, read_manifest
from expertmesh.cluster import record
from expertmesh.config import ClusterConfig, EmulatedDevice, load_config
from expertmesh.coverage import check_coverage
from expertmesh.directory.client import expert_load
from expertmesh.errors import ConfigError
from expertmesh.placement.capacity import (
    Capacity,
    assumed_capacity,
    given_capacity,
    modelled_capacity,
    observed_capacity,
)
from expertmesh.placement.loads import Loads, check_loads, observed_loads, read_loads_file, uniform_loads
from expertmesh.placement.shapes import shape_of
from expertmesh.placement.sizing import Sizing, size_of_artifact, size_of_shape
from expertmesh.wire.tls import TlsFiles


@dataclass(frozen=True)
class Subject:
    """What is planned for: a model, and where it runs already, its config and directory."""

    manifest: Manifest
    sizing: Sizing
    config: ClusterConfig | None
    directory: str | None = None
    tls: TlsFiles | None = None
    """Where the directory asks for a certificate."""


@dataclass(frozen=True)
class DeviceChoice:
    rows_per_replica: float | None
    teraflops: float | None
    memory_gb_per_s: float | None
    batch_rows: int


def find_subject(
    name: str | None,
    artifact: Path | None,
    config: Path | None,
    shape: str | None,
    directory: str | None,
    tls: TlsFiles | None = None,
) -> Subject:
    """Raises an ExpertMeshError where nothing, or more than one thing, is named, or what is named is not there."""
    if directory is not None and artifact is None and config is None:
        known = f"the cluster {name} has its own directory; " if name else ""
        raise ConfigError(f"plan: {known}--directory needs --artifact or --config, whose experts' loads it knows")
    if shape is not None:
        if name or artifact or config:
            raise ConfigError("plan: --shape stands for a model that is not here; no CLUSTER, --artifact or --config")
        called, found = shape_of(shape)
        manifest = found.manifest(called)
        return Subject(manifest, size_of_shape(manifest, found), None)
    if artifact is not None or config is not None:
        if name:
            raise ConfigError(f"plan: either the cluster {name} or --artifact and --config")
        read = load_config(config) if config else None
        folder = artifact or (read.model.artifact if read else Path())
        return _of_artifact(folder, read, directory, tls or (read.security.tls if read else None))
    running = record.require(name)
    read = record.load_deployed(running).config
    return _of_artifact(read.model.artifact, read, running.directory, running.tls)


def _of_artifact(folder: Path, config: ClusterConfig | None, directory: str | None, tls: TlsFiles | None) -> Subject:
    manifest = read_manifest(folder)
    if config is not None:
        check_coverage(config, manifest)
    return Subject(manifest, size_of_artifact(manifest, folder), config, directory, tls)


def find_loads(subject: Subject, given: Path | None, window_s: float, tokens_per_s: float) -> tuple[Loads, str]:
    """The loads and, for people, where they come from."""
    if given is not None:
        found = read_loads_file(given)
        check_loads(found, subject.manifest, str(given))
        return found, str(given)
    if subject.directory is not None:
        reply = expert_load(subject.directory, window_s, tls=subject.tls)
        found = observed_loads(reply, subject.manifest)
        check_loads(found, subject.manifest, "directory")
        return found, f"observed over {reply.window_s:.0f} s"
    return uniform_loads(subject.manifest, tokens_per_s), f"uniform, {tokens_per_s:g} tokens/s"


def find_capacity(
    subject: Subject, loads: Loads, target_busy: float, choice: DeviceChoice, window_s: float
) -> Capacity:
    """Given, of the named device, observed where a cluster runs, of the config's device, or assumed: in this order."""
    if choice.rows_per_replica is not None:
        return given_capacity(choice.rows_per_replica)
    today = subject.config.groups if subject.config else ()
    device = next((group.emulated for group in today if group.emulated), None)
    if choice.teraflops is not None or choice.memory_gb_per_s is not None:
        if choice.teraflops is None or choice.memory_gb_per_s is None:
            raise ConfigError("plan: a modelled device needs both --teraflops and --memory-gb-per-s")
        device = EmulatedDevice(teraflops=choice.teraflops, memory_gb_per_s=choice.memory_gb_per_s)
        return modelled_capacity(device, subject.manifest, choice.batch_rows)
    if subject.directory is not None:
        reply = expert_load(subject.directory, window_s, tls=subject.tls)
        observed = observed_capacity(reply)
        if observed is not None and reply.fingerprint == subject.manifest.fingerprint:
            return observed
    if device is not None:
        return modelled_capacity(device, subject.manifest, choice.batch_rows)
    return assumed_capacity(loads, target_busy, today)
