"""A replica without Ray: in this process, for tests and tools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expert_service.replica import Replica
from expertmesh.args import GroupArgs
from expertmesh.artifact.manifest import read_manifest
from expertmesh.config import GroupSection
from expertmesh.experts import format_indices


def group_args(artifact: Path, group: str, experts: str | dict[str, str], **others: object) -> GroupArgs:
    """Arguments of a group from experts as a cluster config writes them; raises ArtifactError and ConfigError."""
    section = GroupSection(name=group, experts=experts)
    sets = section.expert_sets(read_manifest(artifact))
    texts = {layer: format_indices(indices) for layer, indices in sets.items()}
    return GroupArgs.model_validate({"artifact": str(artifact), "group": group, "experts": texts, **others})


@contextmanager
def serve_replica(args: GroupArgs, directory: str | None = None) -> Iterator[Replica]:
    """A replica that serves from threads of this process while the block runs; announced only where a directory is
    given."""
    replica = Replica(args, directory)
    try:
        yield replica
    finally:
        replica.stop()
