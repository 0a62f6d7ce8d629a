"""Changes YAML text so that it says something else: what stays the same keeps its bytes, order and comments."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from expertmesh.errors import ConfigError

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Node = yaml.Node
Pairs = Mapping[Any, Any]
UNBOUNDED = 2**31
"""Width, so that long strings stay on their line."""


class NotEditable(ConfigError):
    """Text whose structure cannot be changed in place, such as one with anchors and aliases."""


@dataclass(frozen=True)
class Splice:
    """Replaces text[start:end]."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Entry:
    """One pair of a mapping or one item of a sequence: where it begins, and its value."""

    identity: Any
    start: int
    value: Node


def load(text: str, what: str) -> Any:
    """Raises ConfigError with one line that begins with `what`."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{what}: not YAML: {(str(error) or 'nested too deeply').splitlines()[0]}") from None


def rewrite(text: str, before: Any, after: Any) -> str:
    """`text`, which says `before`, changed to say `after`; both are mappings.

    Lists of mappings with a `name` are matched by it; a new one takes the place of one that goes, or comes last.
    Raises NotEditable.
    """
    changed, last = text, len(text)
    for splice in sorted(_Rewriter(text).splices(before, after), key=lambda one: one.start, reverse=True):
        if splice.end > last:
            raise NotEditable("not editable in place: two changes meet")
        changed, last = changed[: splice.start] + splice.text + changed[splice.end :], splice.start
    try:
        if _unordered(load(changed, "the changed text")) == _unordered(after):
            return changed
    except ConfigError:
        pass
    raise NotEditable("not editable in place; are there anchors and aliases?")


class _Rewriter:
    def __init__(self, text: str) -> None:
        self._text = text

    def splices(self, before: Any, after: Any) -> Iterator[Splice]:
        root = yaml.compose(self._text, Loader)
        parts = None if root is None else self._parts(root, before, after)
        if root is None or parts is None:
            raise NotEditable("not editable in place: no mapping")
        yield from self._collection(root, *parts)

    def _parts(self, node: Node, before: Any, after: Any) -> tuple[list[Entry], Pairs, Pairs] | None:
        """What can be changed entry by entry; None for what can only be written anew."""
        if isinstance(node, yaml.MappingNode) and isinstance(before, dict) and isinstance(after, dict):
            entries = [Entry(self._key(key), key.start_mark.index, value) for key, value in node.value]
            return (entries, before, after) if entries and after else None
        if isinstance(node, yaml.SequenceNode) and _named(before) and _named(after) and before and after:
            values = zip(before, node.value, strict=True)
            entries = [Entry(content["name"], item.start_mark.index, item) for content, item in values]
            return entries, {one["name"]: one for one in before}, {one["name"]: one for one in after}
        return None

    def _collection(self, node: Node, entries: Sequence[Entry], old: Pairs, new: Pairs) -> Iterator[Splice]:
        fresh = [key for key in new if key not in old]
        gone = [entry for entry in entries if entry.identity not in new]
        for entry, key in zip(gone, fresh, strict=False):
            yield self._anew(node, entry, key, new[key])
        if rest := fresh[len(gone) :]:
            yield self._appended(node, entries, [(key, new[key]) for key in rest])
        yield from self._removed(node, entries, gone[len(fresh) :])
        for entry in entries:
            key = entry.identity
            if key not in new or old[key] == new[key]:
                continue
            if parts := self._parts(entry.value, old[key], new[key]):
                yield from self._collection(entry.value, *parts)
            elif isinstance(entry.value, yaml.ScalarNode) and not isinstance(new[key], str | list | dict):
                start, end = entry.value.start_mark.index, self._end(entry.value)
                yield Splice(start, end, " " * (start == end) + json.dumps(new[key]))
            else:
                yield self._anew(node, entry, key, new[key])

    def _anew(self, node: Node, entry: Entry, key: Any, value: Any) -> Splice:
        return Splice(entry.start, self._end(entry.value), self._rendered(node, key, value, entry.start))

    def _appended(self, node: Node, entries: Sequence[Entry], pairs: Iterable[tuple[Any, Any]]) -> Splice:
        end = self._end(entries[-1].value)
        if _flows(node):
            return Splice(end, end, "".join(", " + self._rendered(node, key, value, 0) for key, value in pairs))
        column = node.start_mark.column
        dash = "- " if isinstance(node, yaml.SequenceNode) else ""
        shift = column + len(dash)
        lines = [" " * column + dash + self._block(node, key, value, shift) for key, value in pairs]
        place = self._line_end(end)
        return Splice(place, place, "".join(f"\n{line}" for line in lines))

    def _removed(self, node: Node, entries: Sequence[Entry], gone: Sequence[Entry]) -> Iterator[Splice]:
        """One splice for each run of entries that go; at least one entry of the node stays or is replaced."""
        places = [place for place, entry in enumerate(entries) if entry in gone]
        firsts = [place for place in places if place - 1 not in places]
        lasts = [place for place in places if place + 1 not in places]
        for first, last in zip(firsts, lasts, strict=True):
            start, end = entries[first].start, self._end(entries[last].value)
            line = self._text.rfind("\n", 0, start) + 1
            if not _flows(node) and self._text[line:start].strip() == "-" * isinstance(node, yaml.SequenceNode):
                yield Splice(line, min(self._line_end(end) + 1, len(self._text)), "")
            elif last + 1 < len(entries):
                yield Splice(start, entries[last + 1].start, "")
            else:
                yield Splice(self._end(entries[first - 1].value), end, "")

    def _rendered(self, node: Node, key: Any, value: Any, start: int) -> str:
        if not _flows(node):
            return self._block(node, key, value, start - self._text.rfind("\n", 0, start) - 1)
        return json.dumps(value) if isinstance(node, yaml.SequenceNode) else f"{json.dumps(key)}: {json.dumps(value)}"

    def _block(self, node: Node, key: Any, value: Any, column: int) -> str:
        """Its first line without indentation, all further ones from the column on."""
        content = value if isinstance(node, yaml.SequenceNode) else {key: value}
        dumped = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=UNBOUNDED).rstrip("\n")
        return dumped.replace("\n", "\n" + " " * column)

    def _key(self, key: Node) -> Any:
        return load(self._text[key.start_mark.index : key.end_mark.index], "a key")

    def _end(self, node: Node) -> int:
        """Behind its last character; the end mark of a block is where the next token begins."""
        if isinstance(node, yaml.CollectionNode) and not _flows(node) and node.value:
            last = node.value[-1]
            return self._end(last[1] if isinstance(last, tuple) else last)
        end: int = node.end_mark.index
        return max(len(self._text[:end].rstrip()), node.start_mark.index)

    def _line_end(self, place: int) -> int:
        found = self._text.find("\n", place)
        return len(self._text) if found < 0 else found


def _flows(node: Node) -> bool:
    """Written with brackets."""
    return isinstance(node, yaml.CollectionNode) and bool(node.flow_style)


def _named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in value)


def _unordered(value: Any) -> Any:
    """Named lists as mappings."""
    if isinstance(value, dict):
        return {key: _unordered(one) for key, one in value.items()}
    if _named(value) and value:
        return {one["name"]: _unordered(one) for one in value}
    return [_unordered(one) for one in value] if isinstance(value, list) else value
