"""Whether a config's groups can serve an artifact: every expert somewhere, none that does not exist, all in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import ClusterConfig, GroupSection
from expertmesh.errors import ConfigError
from expertmesh.experts import LayerExperts, format_indices

GIB = 2**30


def check_coverage(config: ClusterConfig, manifest: Manifest) -> None:
    """Raises ConfigError that names experts of a layer which no group serves, or a group that its memory can't hold."""
    held = {group.name: group.expert_sets(manifest) for group in config.groups}
    for layer, count in sorted(manifest.layers.items()):
        served: set[int] = set().union(*(sets.get(layer, frozenset()) for sets in held.values()))
        missing = set(range(count)) - served
        if missing:
            noun = "expert" if len(missing) == 1 else "experts"
            verb = "is" if len(missing) == 1 else "are"
            raise ConfigError(f"groups: layer {layer}: {noun} {format_indices(missing)} {verb} in no group")
    for group in config.groups:
        check_memory(group, held[group.name], manifest)


def check_memory(group: GroupSection, held: LayerExperts, manifest: Manifest) -> None:
    """Raises ConfigError where the group's experts are larger than its memory_gib."""
    needed_gib = sum(map(len, held.values())) * manifest.expert_bytes / GIB
    if group.memory_gib is not None and needed_gib > group.memory_gib:
        raise ConfigError(f"group {group.name}: {needed_gib:.3g} GiB of experts, memory_gib is {group.memory_gib:g}")


def check_context(config: ClusterConfig, trunk_config: Mapping[str, Any]) -> None:
    """Raises ConfigError where max_model_len is beyond the positions that the trunk's config.json allows."""
    text_config = trunk_config.get("text_config", trunk_config)
    limit, wanted = text_config.get("max_position_embeddings"), config.engine.max_model_len
    if limit is not None and wanted is not None and wanted > limit:
        raise ConfigError(f"engine.max_model_len: {wanted} is more than the model's {limit} positions")
