"""Results of several benchmarks as one table and as a page that says on what they were measured."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table with one line per figure; figures per case stand side by side."""
    lines = ["| benchmark | figure | value |", "|---|---|---|"]
    for benchmark, figures in results.items():
        lines += [f"| {benchmark} | {name} | {_value(value)} |" for name, value in _flat(figures)]
    return "\n".join(lines)


def write(results: Mapping[str, Mapping[str, Any]], environment: Mapping[str, Any], today: datetime.date) -> Path:
    """Writes benchmarks/results/<date>.md, over the page of the same day; returns its path."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    commit = f"{environment['commit']}{' with changes' if environment['dirty'] else ''}"
    commands = "\n".join(f"python -m benchmarks {name}" for name in results)
    RESULTS.mkdir(exist_ok=True)
    page = RESULTS / f"{today.isoformat()}.md"
    page.write_text(
        f"# Benchmarks of {today.isoformat()}\n\n"
        f"Machine: {environment['processor']}, {environment['cores']} cores, {environment['memory_gib']} GiB, "
        f"{environment['machine']}; load before: {environment['load_1_min']:.2f}.\n"
        f"Versions: Python {environment['python']}, {versions}; commit {commit}.\n"
        "What each figure is stands at the top of benchmarks/NAME.py.\n\n"
        f"```\n{commands}\n```\n\n{table(results)}\n"
    )
    return page


def _flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and figures, where a figure is a plain value or plain values per case."""
    for name, value in figures.items():
        if isinstance(value, Mapping) and any(isinstance(one, Mapping) for one in value.values()):
            yield from _flat(value, f"{prefix}{name}, ")
        elif name != "environment":
            yield f"{prefix}{name}", value


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " · ".join(f"{case}: {_value(one)}" for case, one in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
