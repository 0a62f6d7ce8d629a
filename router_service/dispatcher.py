"""One MoE layer of one step: scatter, wait, have what fails or is late seen to, combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from router_service.dispatch.choice import choose_replicas
from router_service.dispatch.renormalise import surviving_scale
from router_service.dispatch.scatter import Pairs, ReplicaBatch, combine, to_pairs
from router_service.recovery import (
    Counters,
    DispatchRefused,
    ExpertsLeftOut,
    ExpertsUnavailable,
    HedgeBudget,
    Recovery,
    RowsLost,
    make_batches,
)
from router_service.replicas import LiveReplicas
from router_service.transport.base import DirectTransport, Pending, Step, Transport


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
class Dispatcher:
    """What the model sees of the cluster: two calls per MoE layer."""

    replicas: LiveReplicas
    transport: Transport
    wait_s: float = 60.0
    """How long a step waits for an expert that nobody serves."""
    degrade_after_s: float | None = None
    """How long it waits before it goes on without the expert; None: never."""
    counters: Counters = field(default_factory=Counters)
    _budget: HedgeBudget = field(default_factory=HedgeBudget)
    _direct: DirectTransport | None = field(init=False)

    def __post_init__(self) -> None:
        direct = self.transport if isinstance(self.transport, DirectTransport) else None
        object.__setattr__(self, "_direct", direct)

    def start(
        self, layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> Dispatch:
        """Sends hidden_states [T, H] to the experts topk_ids [T, K]; the caller may compute before it calls finish."""
        self._budget.earn()
        if self._direct is not None:
            return self._direct.scatter(layer, hidden_states, topk_ids, topk_weights)
        return self._send(layer, hidden_states, to_pairs(topk_ids, topk_weights))

    def finish(self, dispatch: Dispatch) -> torch.Tensor:
        """The weighted sums [T, H] over each token's experts, in the type and on the device of the hidden states.

        What a replica fails to answer is sent to another; what is late is asked of another too; where no other covers
        the expert, it waits for one. Raises ExpertsUnavailable where an expert was missing for `wait_s`,
        DispatchRefused where a replica calls the dispatch invalid, and RowsLost where two answers agree that a sum is
        no number; all hold the sums of the other tokens. With
        `degrade_after_s` it raises ExpertsLeftOut where a token's sum is one over the experts that survive, scaled by
        `surviving_scale`; a token that none survives for is lost.
        """
        if not isinstance(dispatch, BatchDispatch):
            total = dispatch.gather()
            if total is not None:
                return total
            dispatch = BatchDispatch(dispatch.layer, dispatch.hidden_states, *dispatch.parts())
        recovery = Recovery(
            self.replicas,
            self.transport,
            dispatch.layer,
            dispatch.hidden_states,
            self.wait_s,
            self.degrade_after_s,
            self._budget,
            self.counters,
        )
        parts = recovery.run(dispatch.batches, dispatch.pending, dispatch.unserved)
        parts.sort(key=lambda part: (int(part[0].pair_experts.min()), int(part[0].rows[0])))
        like, lost = dispatch.hidden_states, recovery.lost
        summed = combine(len(like), like.shape[1], torch.float32, parts)
        summed[sorted(recovery.overflowed)] = 0.0
        degraded, unserved = frozenset[int](), recovery.unserved
        if recovery.left_out:
            every = [batch.pairs for batch in dispatch.batches]
            every += [dispatch.unserved] if dispatch.unserved is not None else []
            scale, hopeless = surviving_scale(len(like), every, recovery.left_out)
            summed *= torch.from_numpy(scale)[:, None]
            lost |= frozenset(hopeless.tolist())
            degraded = frozenset(token for pairs in recovery.left_out for token in pairs.tokens.tolist()) - lost
            self.counters.degraded_rows += len(degraded)
            if len(hopeless) and not unserved:
                unserved = f"layer {dispatch.layer}: nobody serves any expert of {len(hopeless)} rows"
        total = summed.to(like.dtype).to(like.device)
        if recovery.refused:
            raise DispatchRefused(recovery.refused, lost, total, degraded)
        if unserved:
            raise ExpertsUnavailable(unserved, lost, total, degraded)
        if recovery.overflowed:
            rows = f"{len(recovery.overflowed)} rows"
            why = f"layer {dispatch.layer}: two answers say that the sums of {rows} are no numbers"
            raise RowsLost(why, lost, total, degraded)
        if degraded:
            raise ExpertsLeftOut(f"layer {dispatch.layer}: {len(degraded)} rows lack an expert", lost, total, degraded)
        return total

    def _send(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> BatchDispatch:
        owners, missing = choose_replicas(pairs.counts(), self.replicas.candidates(layer))
        served = pairs.of(frozenset(owners)) if missing else pairs
        batches = make_batches(self.replicas, served, owners)
        pending = self.transport.start(layer, hidden_states, batches)
        return BatchDispatch(layer, hidden_states, batches, pending, pairs.of(missing) if missing else None)
