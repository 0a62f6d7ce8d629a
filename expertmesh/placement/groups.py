"""Groups of a config as a division, and a division as groups with names, resources and bounds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import GroupSection
from expertmesh.experts import LayerExperts, format_indices
from expertmesh.placement.arrays import Floats
from expertmesh.placement.division import Division, Held

HOT, COLD = 1.5, 0.67
"""Times the mean load per expert from which a group is called hot, and up to which cold."""
DIGEST_LENGTH = 6


def held_by(groups: Sequence[GroupSection], manifest: Manifest) -> Held:
    """[L, G, E]; raises ConfigError naming an expert that does not exist."""
    layers = sorted(manifest.layers)
    held = numpy.zeros((len(layers), len(groups), max(manifest.layers.values())), dtype=bool)
    for number, group in enumerate(groups):
        sets = group.expert_sets(manifest)
        for row, layer in enumerate(layers):
            held[row, number, sorted(sets.get(layer, ()))] = True
    return held


def sections(
    division: Division,
    manifest: Manifest,
    templates: Sequence[GroupSection],
    most: Iterable[int],
    today: Sequence[GroupSection],
) -> tuple[GroupSection, ...]:
    """One section per group, in the division's order, with resources and targets of its template and at `most` so many
    replicas.

    A group that holds what one of today's holds stays as it is but for `max_replicas`. Others are called by how hot
    they are and by a digest of their experts, so that other experts give another name.
    """
    known = {digest(group.expert_sets(manifest)): group for group in today}
    density = division.group_loads / numpy.maximum(division.sizes, 1)
    mean = division.group_loads.sum() / max(1.0, division.sizes.sum())
    made: list[GroupSection] = []
    counts = {"hot": 0, "warm": 0, "cold": 0}
    for number, bound in enumerate(most):
        kind = "hot" if density[number] >= HOT * mean else "cold" if density[number] <= COLD * mean else "warm"
        counts[kind] += 1
        experts = _experts(division.held[:, number], manifest)
        content = digest(experts)
        template, name = templates[number], f"{kind}-{counts[kind]}-{content[:DIGEST_LENGTH]}"
        if content in known:
            template, name = known[content], known[content].name
        bounds = {"min_replicas": min(template.min_replicas, bound), "max_replicas": bound}
        made.append(template.model_copy(update={"name": name, "experts": written(experts, manifest), **bounds}))
    return tuple(made)


def heirs(division: Division, loads: Floats, today: Sequence[GroupSection], held: Held) -> list[GroupSection]:
    """For each group of the division that one of today's which holds most of its load; loads [L, E], `held` today's."""
    rows = division.held * numpy.nan_to_num(loads)[:, None, :]
    theirs, ours = (one.swapaxes(0, 1).reshape(one.shape[1], -1) for one in (held, rows))
    return [today[number] for number in (ours @ theirs.T.astype(float)).argmax(axis=1)]


def digest(experts: LayerExperts) -> str:
    """Of a group's experts: equal experts, equal digest."""
    text = json.dumps([[layer, sorted(held)] for layer, held in sorted(experts.items()) if held])
    return hashlib.sha256(text.encode()).hexdigest()


def written(experts: Mapping[int, frozenset[int]], manifest: Manifest) -> str | dict[str, str]:
    """As configs write it: one set for all layers where it is the same, else per run of layers with the same."""
    texts = {layer: format_indices(held) for layer, held in sorted(experts.items()) if held}
    if len(texts) == len(manifest.layers) and len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    by_text: dict[str, set[int]] = {}
    for layer, text in texts.items():
        by_text.setdefault(text, set()).add(layer)
    return {format_indices(layers): text for text, layers in by_text.items()}


def _experts(held: numpy.typing.NDArray[numpy.bool_], manifest: Manifest) -> LayerExperts:
    """held [L, E] -> layer -> experts."""
    return {
        layer: frozenset(numpy.flatnonzero(held[row]).tolist()) for row, layer in enumerate(sorted(manifest.layers))
    }
