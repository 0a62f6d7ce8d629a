"""Sets of experts: how configs write them ("0-7,12") and how the code holds them (layer -> indices)."""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.errors import ConfigError

WrittenExperts = str | dict[str, str]
"""As configs write them: "0-7,12" in every MoE layer, or per layers: {"0-3": "0-7", "4": "0"}."""

LayerExperts = Mapping[int, frozenset[int]]
"""Decoder layer index -> indices of experts within it."""


def parse_indices(text: str, where: str) -> frozenset[int]:
    """Indices from ranges such as "0-7,12"; raises ConfigError that begins with `where`."""
    found: set[int] = set()
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(f"{where}: {part.strip()!r} is not an index or a range such as 0-7")
        low, high = int(first), int(last) if dash else int(first)
        if low > high or high >= 2**20:
            raise ConfigError(f"{where}: {part.strip()!r} is not an ascending range of indices below 2^20")
        found.update(range(low, high + 1))
    return frozenset(found)


def resolve_experts(written: WrittenExperts, layers: Mapping[int, int], where: str) -> LayerExperts:
    """Experts per MoE layer, where `layers` gives the number of each layer's experts.

    Raises ConfigError, which begins with `where`, naming a layer or an expert that does not exist.
    """
    if isinstance(written, str):
        found = dict.fromkeys(layers, parse_indices(written, where))
    else:
        found = {}
        for ranges, experts in written.items():
            for layer in sorted(parse_indices(ranges, where)):
                found[layer] = found.get(layer, frozenset()) | parse_indices(experts, where)
    for layer, experts_of_layer in found.items():
        if layer not in layers:
            known = format_indices(set(layers))
            raise ConfigError(f"{where}: layer {layer} has no routed experts (MoE layers: {known})")
        beyond = {index for index in experts_of_layer if index >= layers[layer]}
        if beyond:
            raise ConfigError(f"{where}: layer {layer} has experts 0-{layers[layer] - 1}, not {format_indices(beyond)}")
    return found


def numbers_as_text(value: object) -> object:
    """YAML reads `experts: 3` and the key in `{4: 0-3}` as numbers; other values stay as they are."""
    if isinstance(value, dict):
        return {_text(layers): _text(experts) for layers, experts in value.items()}
    return _text(value)


def _text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def format_indices(indices: frozenset[int] | set[int]) -> str:
    """The shortest text that `parse_indices` reads back: {0, 1, 2, 5} -> "0-2,5"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
