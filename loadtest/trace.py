"""Published request traces: Mooncake's JSON lines and BurstGPT's CSV.

Mooncake: {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [ids of 512-token blocks]}; two
requests that begin with the same ids begin with the same text. BurstGPT: a header with `Timestamp` (s), `Request
tokens` and `Response tokens`; a request of which no token came back had failed there, and is left out.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from expertmesh.errors import ConfigError
from loadtest.config import TraceArrivals

MOONCAKE_BLOCK = 512
BURSTGPT_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


@dataclass(frozen=True, slots=True)
class TraceEntry:
    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    entries: tuple[TraceEntry, ...]
    """Times from the start of the replay, at its speed."""
    left_out: int
    """Requests that had failed when the trace was taken."""


def read_trace(arrivals: TraceArrivals) -> Trace:
    """Raises ConfigError naming file and line of a hole, of a value that is none, of a time that goes back."""
    read = _mooncake if arrivals.format == "mooncake" else _burstgpt
    entries: list[TraceEntry] = []
    left_out, before = 0, -math.inf
    try:
        with arrivals.path.open(encoding="utf-8", newline="") as file:
            for where, entry in read(file, str(arrivals.path)):
                if entry.at_s < before:
                    raise ConfigError(f"{where}: time goes back, from {before:g} s to {entry.at_s:g} s")
                before = entry.at_s
                if entry.output_tokens == 0:
                    left_out += 1
                elif entry.at_s >= arrivals.start_s:
                    entries.append(replace(entry, at_s=(entry.at_s - arrivals.start_s) / arrivals.speed))
                if len(entries) == arrivals.max_requests:
                    break
    except OSError as error:
        raise ConfigError(f"{arrivals.path}: {(error.strerror or str(error)).lower()}") from None
    except (UnicodeDecodeError, csv.Error):
        raise ConfigError(f"{arrivals.path}: not text in UTF-8, or no {arrivals.format} trace") from None
    if not entries:
        raise ConfigError(f"{arrivals.path}: holds no request from {arrivals.start_s:g} s on")
    return Trace(tuple(entries), left_out)


def _mooncake(lines: Iterator[str], path: str) -> Iterator[tuple[str, TraceEntry]]:
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            raise ConfigError(f"{where}: {'an empty line' if not line.strip() else 'not JSON'}") from None
        if not isinstance(found, dict):
            raise ConfigError(f"{where}: not an object with timestamp, input_length and output_length")
        blocks = found.get("hash_ids", [])
        if not isinstance(blocks, list) or not all(isinstance(block, int) for block in blocks):
            raise ConfigError(f"{where}: hash_ids: not a list of whole numbers")
        at_ms = _number(found.get("timestamp"), "timestamp", where)
        prompt = _tokens(found.get("input_length"), "input_length", where, least=1)
        output = _tokens(found.get("output_length"), "output_length", where, least=0)
        yield where, TraceEntry(at_ms / 1000, prompt, output, tuple(blocks))


def _burstgpt(lines: Iterator[str], path: str) -> Iterator[tuple[str, TraceEntry]]:
    rows = csv.DictReader(lines)
    missing = [name for name in BURSTGPT_COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise ConfigError(f"{path}:1: no column {missing[0]!r}; a BurstGPT trace has {', '.join(BURSTGPT_COLUMNS)}")
    for row in rows:
        where = f"{path}:{rows.line_num}"
        at_s = _number(row["Timestamp"], "Timestamp", where)
        prompt = _tokens(row["Request tokens"], "Request tokens", where, least=1)
        output = _tokens(row["Response tokens"], "Response tokens", where, least=0)
        yield where, TraceEntry(at_s, prompt, output)


def _number(value: object, name: str, where: str) -> float:
    if value is None or value == "":
        raise ConfigError(f"{where}: {name}: is missing")
    try:
        found = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found) or found < 0:
        raise ConfigError(f"{where}: {name}: {value!r} is no number from 0 on")
    return found


def _tokens(value: object, name: str, where: str, least: int) -> int:
    found = _number(value, name, where)
    if found != int(found) or found < least:
        raise ConfigError(f"{where}: {name}: {value!r} is no whole number from {least} on")
    return int(found)
