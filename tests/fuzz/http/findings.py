"""What our server answers with 5xx, or not in time, and plain vLLM does not; and how that is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fuzz.http.exchange import LIMIT_S, Answer, Exchange, Request, route

SHOWN_BYTES, SHOWN_MESSAGE = 300, 160


@dataclass(frozen=True)
class Comparison:
    request: Request
    ours: Answer
    plain: Answer

    @property
    def is_finding(self) -> bool:
        """Plain vLLM fails in neither of the two ways."""
        return 0 < self.plain.status < 500


@dataclass(frozen=True)
class Finding:
    """Requests of one path that are answered alike; the shortest of them stands for all."""

    path: str
    comparison: Comparison
    requests: int

    def line(self) -> str:
        one = self.comparison
        kind = "".join(value for name, value in one.request.headers if name.lower() == "content-type")
        sent = f"{kind or 'no content type'}, {_shown(one.request.body)}"
        again = f" ({self.requests} such requests)" if self.requests > 1 else ""
        return (
            f"{one.request.method} {self.path}: {_told(one.ours)}; plain vLLM: {_told(one.plain)}; "
            f"sent to {one.request.target}: {sent}{again}"
        )


def findings(compared: Iterable[Comparison], routes: list[str]) -> list[Finding]:
    """One for each way in which a path fails."""
    alike: dict[tuple[str, str, int, str, int], list[Comparison]] = {}
    for one in compared:
        if one.is_finding:
            path = route(one.request.target, routes)
            key = (one.request.method, path, one.ours.status, one.ours.message, one.plain.status)
            alike.setdefault(key, []).append(one)
    return [
        Finding(key[1], min(found, key=lambda one: len(one.request.body)), len(found))
        for key, found in sorted(alike.items())
    ]


def summary(exchanges: Sequence[Exchange], routes: list[str]) -> dict[str, dict[str, int]]:
    """Answers per path and status, `none` for what was not answered in time."""
    counts: dict[str, Counter[str]] = {}
    for one in exchanges:
        path = route(one.request.target, routes)
        counts.setdefault(path, Counter())[str(one.answer.status or "none")] += 1
    return {path: dict(sorted(counted.items())) for path, counted in sorted(counts.items())}


def _told(answer: Answer) -> str:
    if not answer.status:
        return f"no answer within {LIMIT_S:g} s"
    message = " ".join(answer.message.split())
    return f"{answer.status} {message[:SHOWN_MESSAGE]}".strip()


def _shown(body: bytes) -> str:
    text = ascii(body[:SHOWN_BYTES].decode(errors="backslashreplace"))
    return f"{text}… ({len(body):,} bytes)" if len(body) > SHOWN_BYTES else text
