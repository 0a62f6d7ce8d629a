"""Replicas that are functions in this process, for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from expertmesh.v1 import expert_pb2 as pb
from router_service.dispatch.scatter import ReplicaBatch
from router_service.transport.base import Answer

Replica = Callable[[int, torch.Tensor, ReplicaBatch], Answer]
"""(layer, rows [R, H], batch) -> answer."""


@dataclass(frozen=True, slots=True)
class Answered:
    answers: list[Answer]

    def late_after_s(self) -> float:
        return 0.0

    def wait(self, patience_s: float) -> list[Answer | None]:
        return list(self.answers)


@dataclass(frozen=True, slots=True)
class InProcessTransport:
    replicas: Mapping[str, Replica]

    def start(self, layer: int, hidden_states: torch.Tensor, batches: Sequence[ReplicaBatch]) -> Answered:
        return Answered([self._ask(layer, hidden_states, batch) for batch in batches])

    def _ask(self, layer: int, hidden_states: torch.Tensor, batch: ReplicaBatch) -> Answer:
        replica = self.replicas.get(batch.replica)
        if replica is None:
            return Answer(pb.CODE_UNAVAILABLE, "no such replica")
        return replica(layer, hidden_states[torch.from_numpy(batch.rows)], batch)
