"""Sets of experts: how configs write them ("0-7,12") and how the code holds them (layer -> indices)."""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.errors import ConfigError

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


def format_indices(indices: frozenset[int] | set[int]) -> str:
    """The shortest text that `parse_indices` reads back: {0, 1, 2, 5} -> "0-2,5"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
