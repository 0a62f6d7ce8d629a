"""Rows that each expert of each layer got, over sliding windows, from the counters that replicas announce, and for how
long the replicas computed them.

What a counter grew by goes into sums over all replicas, one for every `SLICE_S` seconds; of a replica only its last
counters and, per layer, the last minute are kept. For 61 layers of 256 experts the sums take 25 MB whatever the number
of replicas; 1,000 replicas with 8 experts in each of the layers take 25 MB more, with all 256 experts 290 MB.

Times are seconds of a monotonic clock.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy
from numpy.typing import NDArray

from expertmesh.errors import WireError
from expertmesh.v1 import directory_pb2 as pb

logger = logging.getLogger(__name__)

SLICE_S = 3.0
MAX_WINDOW_S = 600.0
SLICES = int(MAX_WINDOW_S / SLICE_S)
BALANCE_S = 60.0
BALANCE_SLICES = int(BALANCE_S / SLICE_S)
MAX_EXPERTS = 131_072
"""Of one model, over all layers."""
MAX_MODELS = 4
MAX_ROWS_PER_S = 1e8
"""Of one replica, over all layers; more is no measurement."""
MAX_ROWS_TOTAL = 2**53
MAX_SHARE = 1.05
"""Of its time that a replica says to be busy; rounding may take it a little beyond 1."""

Rows = NDArray[numpy.int64]


@dataclass
class Reporter:
    """A live replica that has announced counters."""

    layers: bytes
    """Its experts, serialized."""
    columns: NDArray[numpy.intp]
    """Of its experts, in the sums of its model."""
    starts: NDArray[numpy.intp]
    """Where each of its layers begins among them."""
    layer_numbers: list[int]
    first_at: float
    last_at: float
    rows_total: int
    rows: Rows
    busy_at: float
    busy_s: float = 0.0
    """Of the time from its last counters to `busy_at`."""
    by_layer: deque[tuple[int, Rows]] = field(default_factory=deque)
    """(slice, rows per layer), of the last minute."""


@dataclass
class Model:
    """Sums of one fingerprint."""

    began_at: float
    columns: dict[tuple[int, int], int] = field(default_factory=dict)
    """(layer, expert) -> its place in the sums."""
    slices: dict[int, Rows] = field(default_factory=dict)
    busy_s: dict[int, float] = field(default_factory=dict)
    """Slice -> of all replicas."""

    def place(self, experts: Iterable[tuple[int, int]]) -> NDArray[numpy.intp]:
        return numpy.array([self.columns.setdefault(one, len(self.columns)) for one in experts], dtype=numpy.intp)

    def add(self, number: int, columns: NDArray[numpy.intp], rows: Rows, busy_s: float) -> None:
        sums = self.slices.get(number)
        if sums is None or len(sums) < len(self.columns):
            grown = numpy.zeros(len(self.columns), dtype=numpy.int64)
            if sums is not None:
                grown[: len(sums)] = sums
            self.slices[number] = sums = grown
        sums[columns] += rows
        self.busy_s[number] = self.busy_s.get(number, 0.0) + busy_s

    def trim(self, newest: int) -> None:
        for number in [one for one in self.slices if one <= newest - SLICES]:
            del self.slices[number], self.busy_s[number]

    def total(self, oldest: int) -> Rows:
        sums = numpy.zeros(len(self.columns), dtype=numpy.int64)
        for number, rows in self.slices.items():
            if number >= oldest:
                sums[: len(rows)] += rows
        return sums


class ExpertLoads:
    """Fed with announcements, told of replicas that leave, asked for windows."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._reporters: dict[str, tuple[str, Reporter]] = {}
        """replica id -> (fingerprint, what it reported)"""
        self._refused: set[str] = set()
        """Replicas whose last report was refused."""

    def announce(self, replica: pb.Replica, reported: Sequence[pb.LayerRows], now: float) -> None:
        """Takes a replica's counters, unless they cannot be true: those are refused, with one line in the log until
        the replica makes sense again, and change nothing."""
        self._note_busy(replica, now)
        if not reported:
            return
        try:
            self._take(replica, reported, now)
        except WireError as error:
            if replica.replica_id not in self._refused:
                logger.warning("replica %s: its expert rows do not count: %s", replica.replica_id, error)
            self._refused.add(replica.replica_id)
        else:
            self._refused.discard(replica.replica_id)

    def withdraw(self, replica_id: str) -> None:
        """The replica has left; what it got stays in the windows."""
        self._reporters.pop(replica_id, None)
        self._refused.discard(replica_id)

    def _note_busy(self, replica: pb.Replica, now: float) -> None:
        """The share that it tells holds since it told the last one; what is no share counts as none."""
        _, reporter = self._reporters.get(replica.replica_id, ("", None))
        if reporter is not None:
            share = replica.load.busy if 0 <= replica.load.busy <= MAX_SHARE else 0.0
            reporter.busy_s += min(1.0, share) * (now - reporter.busy_at)
            reporter.busy_at = now

    def _take(self, replica: pb.Replica, reported: Sequence[pb.LayerRows], now: float) -> None:
        rows = _checked(replica, reported)
        known = self._reporters.get(replica.replica_id)
        layers = b"".join(one.SerializeToString(deterministic=True) for one in replica.layers)
        if known is None or known[0] != replica.fingerprint or known[1].layers != layers:
            self._begin(replica, layers, rows, now)
            return
        reporter = known[1]
        growth = rows - reporter.rows
        if growth.min(initial=0) < 0:
            raise WireError("a counter went backwards")
        more = replica.load.rows_total - reporter.rows_total
        if not 0 <= more <= MAX_ROWS_PER_S * max(1.0, now - reporter.last_at):
            raise WireError(f"{more} rows in {now - reporter.last_at:.1f} s are impossible")
        self._add(self._models[replica.fingerprint], reporter, growth, now)
        reporter.rows, reporter.rows_total, reporter.last_at = rows, replica.load.rows_total, now

    def _begin(self, replica: pb.Replica, layers: bytes, rows: Rows, now: float) -> None:
        """What it counted before the directory knew it belongs to no window."""
        model = self._models.get(replica.fingerprint) or self._add_model(replica.fingerprint, now)
        experts = [(one.layer, expert) for one in replica.layers for expert in one.experts]
        if len(model.columns) + sum(one not in model.columns for one in experts) > MAX_EXPERTS:
            raise WireError(f"with its experts the model has more than {MAX_EXPERTS}")
        starts = numpy.cumsum([0, *(len(one.experts) for one in replica.layers)], dtype=numpy.intp)[:-1]
        numbers = [one.layer for one in replica.layers]
        reporter = Reporter(layers, model.place(experts), starts, numbers, now, now, replica.load.rows_total, rows, now)
        self._reporters[replica.replica_id] = replica.fingerprint, reporter

    def _add_model(self, fingerprint: str, now: float) -> Model:
        used = {of for of, _ in self._reporters.values()}
        for idle in [one for one in self._models if one not in used]:
            if len(self._models) >= MAX_MODELS:
                del self._models[idle]
        if len(self._models) >= MAX_MODELS:
            raise WireError(f"replicas announce {MAX_MODELS} models already")
        return self._models.setdefault(fingerprint, Model(now))

    def _add(self, model: Model, reporter: Reporter, growth: Rows, now: float) -> None:
        """Over the slices since its last report, evenly, so that a report that comes late makes no peak."""
        newest = _slice(now)
        count = max(1, min(SLICES, newest - _slice(reporter.last_at)))
        share, busy_s, reporter.busy_s = growth // count, reporter.busy_s / count, 0.0
        for number in range(newest - count + 1, newest + 1):
            part = growth - share * (count - 1) if number == newest else share
            model.add(number, reporter.columns, part, busy_s)
            per_layer = numpy.add.reduceat(part, reporter.starts)
            if reporter.by_layer and reporter.by_layer[-1][0] == number:
                per_layer = per_layer + reporter.by_layer.pop()[1]
            reporter.by_layer.append((number, per_layer))
        model.trim(newest)
        while reporter.by_layer[0][0] <= newest - BALANCE_SLICES:
            reporter.by_layer.popleft()

    def reply(self, window_s: float, now: float) -> pb.ExpertLoadReply:
        """Raises WireError where the window is none."""
        if not 0 <= window_s <= MAX_WINDOW_S:
            raise WireError(f"window_s {window_s:g} is not within 0 to {MAX_WINDOW_S:g}")
        fingerprint = self._fingerprint()
        model = self._models.get(fingerprint)
        if model is None:
            return pb.ExpertLoadReply()
        live = [reporter for of, reporter in self._reporters.values() if of == fingerprint]
        if window_s == 0:
            rows = numpy.zeros(len(model.columns), dtype=numpy.int64)
            for reporter in live:
                rows[reporter.columns] += reporter.rows
            covered_s, busy_s = now - model.began_at, 0.0
        else:
            oldest = _slice(now) - min(SLICES, max(1, round(window_s / SLICE_S))) + 1
            rows = model.total(oldest)
            covered_s = now - max(oldest * SLICE_S, model.began_at)
            busy_s = sum(found for number, found in model.busy_s.items() if number >= oldest)
        return pb.ExpertLoadReply(
            fingerprint=fingerprint,
            window_s=covered_s,
            busy_s=busy_s,
            layers=_by_layer(model, rows),
            oldest_report_s=max((now - one.last_at for one in live), default=0.0),
            balance=[pb.LayerBalance(layer=layer, balancedness=value) for layer, value in _balance(live, now).items()],
        )

    def _fingerprint(self) -> str:
        """Of the model that most replicas serve; the last one known where none is left."""
        counts = Counter(of for of, _ in self._reporters.values())
        return max(counts, key=lambda one: (counts[one], one), default=next(reversed(self._models), ""))


def _checked(replica: pb.Replica, reported: Sequence[pb.LayerRows]) -> Rows:
    """The counters in the order of the replica's experts; raises WireError where they cannot be true.

    Each of the replica's rows belongs to one layer, and gives an expert one row at most.
    """
    if [one.layer for one in reported] != [one.layer for one in replica.layers]:
        raise WireError("their layers are not those that it announces")
    explained = 0
    for layer, held in zip(reported, replica.layers, strict=True):
        if not held.experts or layer.experts != held.experts:
            raise WireError(f"layer {layer.layer}: their experts are not those that it announces")
        if len(layer.rows) != len(layer.experts):
            raise WireError(f"layer {layer.layer}: {len(layer.rows)} counters for {len(layer.experts)} experts")
        explained += max(layer.rows)
    if explained > replica.load.rows_total:
        raise WireError(f"its experts got {explained} rows or more, of {replica.load.rows_total} in all")
    if replica.load.rows_total > MAX_ROWS_TOTAL:
        raise WireError(f"{replica.load.rows_total} rows are impossible")
    return numpy.array([rows for one in reported for rows in one.rows], dtype=numpy.int64)


def _slice(now: float) -> int:
    return int(now // SLICE_S)


def _by_layer(model: Model, rows: Rows) -> list[pb.LayerRows]:
    layers: dict[int, list[tuple[int, int]]] = {}
    for (layer, expert), count in zip(model.columns, rows.tolist(), strict=True):
        layers.setdefault(layer, []).append((expert, count))
    return [
        pb.LayerRows(layer=layer, experts=[expert for expert, _ in found], rows=[count for _, count in found])
        for layer, found in sorted((layer, sorted(found)) for layer, found in layers.items())
    ]


def _balance(live: list[Reporter], now: float) -> dict[int, float]:
    """Layer -> mean over largest of the rows per second that its replicas got within the last minute."""
    rates: dict[int, list[float]] = {}
    oldest = _slice(now) - BALANCE_SLICES + 1
    for one in live:
        known_s = one.last_at - max(one.first_at, oldest * SLICE_S)
        if known_s < SLICE_S:
            continue
        rows = sum(
            (rows for number, rows in one.by_layer if number >= oldest), numpy.zeros(len(one.starts), numpy.int64)
        )
        for layer, count in zip(one.layer_numbers, rows.tolist(), strict=True):
            rates.setdefault(layer, []).append(count / known_s)
    return {layer: sum(of) / len(of) / max(of) for layer, of in sorted(rates.items()) if max(of) > 0}
