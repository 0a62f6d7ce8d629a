"""One MoE layer of one step: scatter, wait, send again what failed, combine."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from expertmesh.errors import ExpertMeshError
from expertmesh.experts import format_indices
from expertmesh.v1 import expert_pb2 as pb
from router_service.dispatch.choice import choose_replicas
from router_service.dispatch.scatter import Pairs, ReplicaBatch, combine, scatter, split, to_pairs
from router_service.replicas import LiveReplicas
from router_service.transport.base import Answer, DirectTransport, Pending, Step, Transport

log = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.02
HOPELESS = frozenset({pb.CODE_INVALID_ARGUMENT})


class ExpertsUnavailable(ExpertMeshError):
    """No replica served an expert for as long as the router was told to wait."""


class DispatchRefused(ExpertMeshError):
    """A replica calls a dispatch invalid, so that sending it again cannot help."""


@dataclass(frozen=True, slots=True)
class BatchDispatch:
    """A layer whose rows are on their way in batches made here."""

    layer: int
    hidden_states: torch.Tensor
    batches: Sequence[ReplicaBatch]
    pending: Pending
    unserved: Pairs | None
    """Pairs that no live replica covered."""


Dispatch = BatchDispatch | Step
"""A layer whose rows are on their way."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Answers that are there already."""

    answers: list[Answer]

    def wait(self) -> list[Answer]:
        return self.answers


@dataclass(frozen=True, slots=True)
class Dispatcher:
    """What the model sees of the cluster: two calls per MoE layer."""

    replicas: LiveReplicas
    transport: Transport
    wait_s: float = 60.0
    """How long a step waits for an expert that nobody serves."""
    _direct: DirectTransport | None = field(init=False)

    def __post_init__(self) -> None:
        direct = self.transport if isinstance(self.transport, DirectTransport) else None
        object.__setattr__(self, "_direct", direct)

    def start(
        self, layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> Dispatch:
        """Sends hidden_states [T, H] to the experts topk_ids [T, K]; the caller may compute before it calls finish."""
        if self._direct is not None:
            return self._direct.scatter(layer, hidden_states, topk_ids, topk_weights)
        return self._send(layer, hidden_states, to_pairs(topk_ids, topk_weights), frozenset())

    def finish(self, dispatch: Dispatch) -> torch.Tensor:
        """The weighted sums [T, H] over each token's experts, in the type and on the device of the hidden states.

        What a replica fails to answer is sent to another; where no other covers the expert, it waits for one. Raises
        ExpertsUnavailable after `wait_s`, DispatchRefused where a replica calls the dispatch invalid.
        """
        if not isinstance(dispatch, BatchDispatch):
            total = dispatch.gather()
            if total is not None:
                return total
            batches, answers, unserved = dispatch.answers()
            dispatch = BatchDispatch(dispatch.layer, dispatch.hidden_states, batches, Answered(answers), unserved)
        return self._complete(dispatch)

    def _complete(self, dispatch: BatchDispatch) -> torch.Tensor:
        deadline = time.monotonic() + self.wait_s
        parts: list[tuple[ReplicaBatch, torch.Tensor]] = []
        failed_replicas: set[str] = set()
        while True:
            failed = self._collect(dispatch, parts, failed_replicas)
            if not len(failed.tokens):
                break
            if time.monotonic() > deadline:
                raise ExpertsUnavailable(self._explain(dispatch.layer, failed))
            dispatch = self._send_again(dispatch, failed, failed_replicas, deadline)
        parts.sort(key=lambda part: (int(part[0].pair_experts.min()), int(part[0].rows[0])))
        rows, width = dispatch.hidden_states.shape
        total = combine(rows, width, dispatch.hidden_states.dtype, parts)
        return total.to(dispatch.hidden_states.device)

    def _send(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs, excluded: frozenset[str]) -> BatchDispatch:
        owners, missing = choose_replicas(pairs.counts(), self.replicas.candidates(layer, excluded))
        unserved = pairs.of(missing) if missing else None
        served = pairs.of(frozenset(owners)) if missing else pairs
        live = self.replicas.snapshot()
        batches = [
            part
            for batch in (scatter(served, owners) if owners else [])
            for part in split(batch, live[batch.replica].max_rows if batch.replica in live else len(batch.rows))
        ]
        return BatchDispatch(
            layer, hidden_states, batches, self.transport.start(layer, hidden_states, batches), unserved
        )

    def _collect(
        self, dispatch: BatchDispatch, parts: list[tuple[ReplicaBatch, torch.Tensor]], failed_replicas: set[str]
    ) -> Pairs:
        """Appends the parts that arrived; returns the pairs that still need an answer."""
        failed = [dispatch.unserved] if dispatch.unserved is not None else []
        for batch, answer in zip(dispatch.batches, dispatch.pending.wait(), strict=True):
            if answer.output is not None:
                parts.append((batch, answer.output))
                continue
            self._note_failure(dispatch.layer, batch, answer, failed_replicas)
            failed.append(batch.pairs)
        return Pairs(
            np.concatenate([one.tokens for one in failed]) if failed else np.empty(0, np.int64),
            np.concatenate([one.experts for one in failed]) if failed else np.empty(0, np.int32),
            np.concatenate([one.weights for one in failed]) if failed else np.empty(0, np.float32),
        )

    def _note_failure(self, layer: int, batch: ReplicaBatch, answer: Answer, failed_replicas: set[str]) -> None:
        reason = f"replica {batch.replica}, layer {layer}: {pb.Code.Name(answer.code)} {answer.message}".rstrip()
        if answer.code in HOPELESS:
            raise DispatchRefused(reason)
        log.warning("%s; %d rows are sent again", reason, len(batch.rows))
        failed_replicas.add(batch.replica)

    def _send_again(
        self, dispatch: BatchDispatch, failed: Pairs, failed_replicas: set[str], deadline: float
    ) -> BatchDispatch:
        """Another replica at once where one covers the experts; else the same ones after a pause or a change."""
        seen = self.replicas.snapshot()
        again = self._send(dispatch.layer, dispatch.hidden_states, failed, frozenset(failed_replicas))
        if again.unserved is None or again.batches:
            return again
        failed_replicas.clear()
        usable = choose_replicas(failed.counts(), self.replicas.candidates(dispatch.layer))[0]
        pause = RETRY_PAUSE_S if usable else max(0.0, deadline - time.monotonic())
        self.replicas.wait_for_change(seen, pause)
        return self._send(dispatch.layer, dispatch.hidden_states, failed, frozenset())

    def _explain(self, layer: int, failed: Pairs) -> str:
        missing = format_indices(set(failed.counts()))
        refused = "".join(f"; {address} refused: {why}" for address, why in sorted(self.replicas.refused.items()))
        return f"layer {layer}: no replica served experts {missing} within {self.wait_s:g} s{refused}"
