"""The replicas that this router may use now, with what is known of their load."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from expertmesh.experts import LayerExperts
from expertmesh.v1 import expert_pb2 as pb
from router_service.dispatch.choice import Candidate


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


@dataclass
class LiveReplicas:
    """Thread-safe. The transport's thread adds and removes; the engine's thread reads and waits."""

    _by_id: dict[str, LiveReplica] = field(default_factory=dict)
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
        with self._changed:
            self._change({key: value for key, value in self._by_id.items() if key != replica_id})

    def _change(self, by_id: dict[str, LiveReplica]) -> None:
        for listener in self._listeners:
            listener(by_id)
        self._by_id = by_id
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
