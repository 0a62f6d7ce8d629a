"""The replicas that this router may use now, with what is known of their load."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from expertmesh.experts import LayerExperts, format_indices
from expertmesh.v1 import expert_pb2 as pb
from router_service.dispatch.choice import Candidate

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LAST_PAUSE_S, FORGIVEN_AFTER_S = 1.0, 30.0, 60.0

Reason = Literal["late", "silent", "timeout", "not_finite", "checksum", "error"]
"""Another replica answered first · no answer while idle · no answer at all · sums that are no numbers · a checksum that
differs or is missing · an error, or sums of another shape or type."""


def experts_by_layer(layers: Iterable[pb.LayerExperts]) -> LayerExperts:
    return {one.layer: frozenset(one.experts) for one in layers}


@dataclass(slots=True)
class LiveReplica:
    """A replica with an open stream."""

    replica_id: str
    group: str
    experts: LayerExperts
    max_rows: int
    """It takes per message."""
    queued_rows: int = 0
    """It said it had when it last answered, less what was ours."""
    rows_under_way: int = 0
    """From this router, unanswered."""
    rows_sent: int = 0
    """From this router, in all."""
    count: Callable[[], tuple[int, int, int]] | None = None
    """Gives the three numbers above where a transport counts them itself."""

    def refresh(self) -> None:
        if self.count is not None:
            self.queued_rows, self.rows_under_way, self.rows_sent = self.count()


@dataclass(slots=True)
class Suspension:
    """A live replica that gets no rows for the time being."""

    replica: LiveReplica
    probe_at: float
    """When to try whether it answers again; seconds of the monotonic clock."""
    pause_s: float
    silent: bool = False
    """It answered nothing at all: `note_answer` ends it, and no probe is needed."""


class Suspensions(TypedDict):
    """Per group, in types that any encoding has."""

    now: dict[str, int]
    """Replicas that are suspended; 0 for other groups that are live."""
    since_start: dict[str, dict[Reason, int]]


@dataclass
class LiveReplicas:
    """Thread-safe. The transport's thread adds and removes; the engine's thread reads, waits and suspends."""

    _by_id: dict[str, LiveReplica] = field(default_factory=dict)
    _suspended: dict[str, Suspension] = field(default_factory=dict)
    _pauses: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Replica -> (how long it was suspended last, when that ended)."""
    _suspensions: Counter[tuple[str, Reason]] = field(default_factory=Counter)
    """(group, reason) -> how often."""
    _missing: dict[tuple[int, int], float] = field(default_factory=dict)
    """(layer, expert) that rows wait for -> since when."""
    _left_out: frozenset[tuple[int, int]] = frozenset()
    """(layer, expert) that rows went on without, of those that are missing."""
    on_missing: Callable[[int, frozenset[int]], None] | None = None
    """Told of experts of a layer that rows wait for and nobody serves."""
    _changed: threading.Condition = field(default_factory=threading.Condition)
    refused: dict[str, str] = field(default_factory=dict)
    """Address -> why a replica there is not used."""
    _listeners: list[Callable[[Mapping[str, LiveReplica]], None]] = field(default_factory=list)

    def listen(self, listener: Callable[[Mapping[str, LiveReplica]], None]) -> None:
        """Calls it with every new set of replicas, on the thread that changes it and before the change is seen."""
        self._listeners.append(listener)

    def add(self, replica: LiveReplica) -> None:
        with self._changed:
            self._change({**self._by_id, replica.replica_id: replica})

    def remove(self, replica_id: str) -> None:
        """Those that rest get rows again where they are now the only ones to serve some expert; a silent one does not,
        since rows would but wait for it."""
        with self._changed:
            self._suspended.pop(replica_id, None)
            rest = {key: value for key, value in self._by_id.items() if key != replica_id}
            for key, one in tuple(self._suspended.items()):
                if not one.silent and not _covered(one.replica, rest.values()):
                    rest[key] = self._suspended.pop(key).replica
            self._change(rest)

    def suspend(self, replica_id: str, reason: Reason, message: str) -> bool:
        """Gives it no more rows until `resume`, unless it is the only one to serve some expert; whether it did.

        Its pause is FIRST_PAUSE_S, and twice the last one where it was suspended shortly before.
        """
        with self._changed:
            now = time.monotonic()
            last_s, ended_at = self._pauses.get(replica_id, (0.0, float("-inf")))
            again = now - ended_at < FORGIVEN_AFTER_S
            pause_s = min(LAST_PAUSE_S, 2 * last_s) if again and last_s else FIRST_PAUSE_S
            if not self._set_aside(replica_id, reason, now + pause_s, pause_s):
                return False
        log.warning("replica %s gets no rows for %.0f s: %s", replica_id, pause_s, message)
        return True

    def note_silence(self, replica_id: str) -> None:
        """Gives it no rows until it answers anything, unless it is the only one to serve some expert."""
        with self._changed:
            if not self._set_aside(replica_id, "silent", float("inf"), 0.0):
                return
        log.warning("replica %s is silent and gets no rows until it answers", replica_id)

    def note_answer(self, replica_id: str) -> None:
        """A replica answered: one that was silent gets rows again."""
        suspension = self._suspended.get(replica_id)
        if suspension is not None and suspension.silent:
            self.resume(replica_id)

    def _set_aside(self, replica_id: str, reason: Reason, probe_at: float, pause_s: float) -> bool:
        replica = self._by_id.get(replica_id)
        rest = {key: value for key, value in self._by_id.items() if key != replica_id}
        if replica is None or not _covered(replica, rest.values()):
            return False
        self._suspended[replica_id] = Suspension(replica, probe_at, pause_s, silent=reason == "silent")
        self._suspensions[replica.group, reason] += 1
        self._change(rest)
        return True

    def resume(self, replica_id: str) -> None:
        """Gives a suspended replica rows again."""
        with self._changed:
            suspension = self._suspended.pop(replica_id, None)
            if suspension is None:
                return
            if not suspension.silent:
                self._pauses[replica_id] = suspension.pause_s, time.monotonic()
            self._change({**self._by_id, replica_id: suspension.replica})
        log.info("replica %s answers again", replica_id)

    def suspended(self) -> Mapping[str, Suspension]:
        return dict(self._suspended)

    def suspensions(self) -> Suspensions:
        with self._changed:
            resting = Counter(one.replica.group for one in self._suspended.values())
            groups = {one.group for one in self._by_id.values()} | resting.keys()
            since_start: dict[str, dict[Reason, int]] = {}
            for (group, reason), count in self._suspensions.items():
                since_start.setdefault(group, {})[reason] = count
        return {"now": {group: resting[group] for group in groups}, "since_start": since_start}

    def postpone(self, replica_id: str) -> None:
        """A suspended replica did not answer a probe."""
        suspension = self._suspended.get(replica_id)
        if suspension is not None:
            suspension.pause_s = min(LAST_PAUSE_S, 2 * suspension.pause_s)
            suspension.probe_at = time.monotonic() + suspension.pause_s

    def note_missing(self, layer: int, experts: frozenset[int]) -> dict[int, float]:
        """Rows wait for experts that nobody serves; expert -> since when, seconds of the monotonic clock."""
        if self.on_missing is not None:
            self.on_missing(layer, experts)
        with self._changed:
            now = time.monotonic()
            return {expert: self._missing.setdefault((layer, expert), now) for expert in experts}

    def note_left_out(self, layer: int, experts: frozenset[int]) -> None:
        """Rows went on without missing experts; said once, until all that were left out are served again."""
        with self._changed:
            said, self._left_out = bool(self._left_out), self._left_out | {(layer, expert) for expert in experts}
        if not said:
            which = format_indices(set(experts))
            log.warning("degraded: layer %d goes on without experts %s; answers concerned are marked", layer, which)

    def _change(self, by_id: dict[str, LiveReplica]) -> None:
        for listener in self._listeners:
            listener(by_id)
        self._by_id = by_id
        if self._missing:
            served = {(at, one) for live in by_id.values() for at, held in live.experts.items() for one in held}
            self._missing = {key: since for key, since in self._missing.items() if key not in served}
            if self._left_out and self._left_out <= served:
                log.warning("no longer degraded: all experts that were left out are served again")
            self._left_out -= served
        self._changed.notify_all()

    def snapshot(self) -> Mapping[str, LiveReplica]:
        return self._by_id

    def candidates(self, layer: int, excluded: frozenset[str] = frozenset()) -> list[Candidate]:
        """The replicas with experts of the layer, without the excluded."""
        live = self._by_id.values()
        for one in live:
            one.refresh()
        return [
            Candidate(one.replica_id, one.experts[layer], one.queued_rows + one.rows_under_way, one.rows_sent)
            for one in live
            if layer in one.experts and one.replica_id not in excluded
        ]

    def wait_for_change(self, seen: Mapping[str, LiveReplica], timeout_s: float) -> None:
        """Returns when the set is no longer `seen` (of `snapshot`) or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._by_id is not seen, timeout_s)


def _covered(replica: LiveReplica, others: Iterable[LiveReplica]) -> bool:
    """Whether every expert of the replica has another one."""
    rest = list(others)
    return all(
        experts <= frozenset().union(*(one.experts.get(layer, frozenset()) for one in rest))
        for layer, experts in replica.experts.items()
    )
