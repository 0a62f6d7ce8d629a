"""How a run stands while it goes on."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loadtest.client import Report
from loadtest.metrics import ttft_s
from loadtest.records import INTENDED, RequestRecord, StageSpan, Status

RECENT_S = 5.0
PLAIN_EVERY_S = 10.0


@dataclass
class Standing:
    """Of one repeat, from what the client processes have told."""

    spans: tuple[StageSpan, ...]
    repeat: int
    repeats: int
    now_s: float = 0.0
    sent: dict[int, int] = field(default_factory=dict)
    open: dict[int, int] = field(default_factory=dict)
    loop_lag_s: float = 0.0
    statuses: Counter[Status] = field(default_factory=Counter)
    tokens: int = 0
    recent: deque[RequestRecord] = field(default_factory=deque)
    """Requests that ended within the last seconds."""

    def add(self, shard: int, report: Report) -> None:
        self.sent[shard], self.open[shard] = report.sent, report.open
        self.loop_lag_s = max(self.loop_lag_s, report.loop_lag_s)
        for record in report.records:
            self.statuses[record.status] += 1
            self.tokens += record.output_tokens
            self.recent.append(record)

    def forget_old(self) -> None:
        while self.recent and self.recent[0].done_s < self.now_s - RECENT_S:
            self.recent.popleft()

    @property
    def stage(self) -> str:
        return next((span.name for span in self.spans if self.now_s < span.end_s), "waiting for answers")

    @property
    def errors(self) -> int:
        return sum(count for status, count in self.statuses.items() if status not in INTENDED)


class Progress:
    """A few lines that are drawn anew on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._told_at = time.monotonic()

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, standing: Standing) -> None:
        standing.forget_old()
        if self._live is not None:
            self._live.update(render(standing))
        elif time.monotonic() - self._told_at >= PLAIN_EVERY_S:
            self._told_at = time.monotonic()
            line = "  ".join(f"{name} {value}" for name, value in facts(standing).items())
            self._console.print(line, highlight=False, soft_wrap=True)


def facts(standing: Standing) -> dict[str, str]:
    """Name -> value, in the order to show them."""
    answered = [record for record in standing.recent if record.status == "ok"]
    seconds = max(0.1, min(RECENT_S, standing.now_s))
    found = {
        "time": f"{standing.now_s:.0f} of {standing.spans[-1].end_s:.0f} s",
        "stage": standing.stage,
        "sent": str(sum(standing.sent.values())),
        "open": str(sum(standing.open.values())),
        "answered": str(standing.statuses["ok"]),
        "errors": str(standing.errors),
        "answers/s": f"{len(answered) / seconds:.1f}",
        "tokens/s": f"{sum(record.output_tokens for record in answered) / seconds:.0f}",
    }
    if answered:
        p50, p99 = np.percentile([1000 * ttft_s(record) for record in answered], [50, 99])
        found["TTFT p50/p99"] = f"{p50:.0f}/{p99:.0f} ms"
    late = [1000 * late for record in standing.recent if (late := record.lateness_s) is not None]
    if late:
        found["lateness p99"] = f"{np.percentile(late, 99):.1f} ms"
    if standing.repeats > 1:
        found["repeat"] = f"{standing.repeat + 1} of {standing.repeats}"
    return found


def render(standing: Standing) -> RenderableType:
    table = Table.grid(padding=(0, 3))
    found = list(facts(standing).items())
    columns = 4
    for row in range(0, len(found), columns):
        table.add_row(*(Text.assemble((f"{name} ", "dim"), value) for name, value in found[row : row + columns]))
    total = standing.spans[-1].end_s
    return Group(ProgressBar(total=total, completed=min(total, standing.now_s), width=80), table)
