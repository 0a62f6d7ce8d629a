"""The chart's README: a head, and one row per value from the comments `# -- …` in values.yaml."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from tools.chart.helm import CHART

MARK = "# -- "
HEAD = CHART / "README.head.md"


@dataclass(frozen=True)
class Row:
    path: str
    default: str
    meaning: str


def text() -> str:
    lines = [HEAD.read_text().rstrip(), "", "| value | default | meaning |", "|---|---|---|"]
    lines += [f"| `{row.path}` | `{row.default}` | {row.meaning} |" for row in rows()]
    return "\n".join(lines) + "\n"


def rows() -> Iterator[Row]:
    """Raises ValueError naming a value that no comment explains."""
    source = (CHART / "values.yaml").read_text()
    document = yaml.compose(source)
    assert isinstance(document, yaml.MappingNode)
    yield from _walk(document, "", source.splitlines())


def _walk(node: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[Row]:
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        meaning = _comment(lines, key.start_mark.line)
        if meaning:
            yield Row(path, _default(value), meaning)
        elif isinstance(value, yaml.MappingNode) and value.value:
            yield from _walk(value, f"{path}.", lines)
        else:
            raise ValueError(f"values.yaml: {path} has no comment that begins with {MARK!r}")


def _comment(lines: list[str], line: int) -> str:
    """The comment right above a line, where it begins with MARK, as one line."""
    block: list[str] = []
    while line and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        block.insert(0, lines[line].lstrip())
    if not block or not block[0].startswith(MARK):
        return ""
    first, *rest = block
    return " ".join([first.removeprefix(MARK), *(one.removeprefix("# ") for one in rest)]).replace("|", "\\|")


def _default(node: yaml.Node) -> str:
    value = yaml.SafeLoader("").construct_document(node) if isinstance(node, yaml.Node) else None
    return json.dumps(value)
