"""The seam between dispatch and the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from expertmesh.v1 import expert_pb2 as pb
from router_service.dispatch.scatter import Pairs, ReplicaBatch


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one answered batch, microseconds."""

    round_trip_us: int
    queue_us: int
    compute_us: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one batch."""

    code: pb.Code.ValueType
    message: str = ""
    output: torch.Tensor | None = None
    """[R, H] where the code is OK."""
    timing: Timing | None = None

    @property
    def ok(self) -> bool:
        return self.code == pb.CODE_OK


class Pending(Protocol):
    """Batches under way."""

    def late_after_s(self) -> float:
        """Seconds from now until an answer that has not come is late, by what the replicas usually take; 0: it is."""

    def wait(self, patience_s: float) -> list[Answer | None]:
        """Returns when every batch has an answer or `patience_s` has passed; in the order of the batches, None for what
        has not come. Failures are answers, not exceptions. May be called again."""


class Transport(Protocol):
    def start(self, layer: int, hidden_states: torch.Tensor, batches: Sequence[ReplicaBatch]) -> Pending:
        """Sends each batch's rows of hidden_states [T, H] to its replica and returns without waiting."""


class Step(Protocol):
    """A whole layer under way."""

    @property
    def layer(self) -> int: ...

    @property
    def hidden_states(self) -> torch.Tensor:
        """[T, H]"""

    def gather(self) -> torch.Tensor | None:
        """Waits for all answers; gives what `combine` gives for them, on the device of the hidden states. None where
        an answer failed or is late or a pair has no replica."""

    def parts(self) -> tuple[list[ReplicaBatch], Pending, Pairs | None]:
        """After `gather` gave None: the batches, their answers and the pairs without a replica."""


@runtime_checkable
class DirectTransport(Transport, Protocol):
    """A transport that chooses, scatters and combines by itself, with the results of `router_service.dispatch`."""

    def scatter(
        self, layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> Step:
        """Sends hidden_states [T, H] to the experts topk_ids [T, K] and returns without waiting."""
