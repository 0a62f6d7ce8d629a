"""What becomes of a layer's rows whose answers failed or are late: sent again, asked for twice, waited for."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from expertmesh.errors import ExpertMeshError
from expertmesh.experts import format_indices
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.status import code_name
from router_service.dispatch.choice import choose_replicas
from router_service.dispatch.scatter import Pairs, ReplicaBatch, scatter, split
from router_service.replicas import LiveReplicas, Reason
from router_service.transport.base import Answer, Pending, Transport

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LAST_PAUSE_S = 0.01, 0.5
"""Before rows are sent again to replicas that failed them already; doubled each time, with jitter."""
LOOK_S = 0.001
"""How long one of several exchanges under way is waited for before the next is looked at."""
HOPELESS = frozenset({pb.CODE_INVALID_ARGUMENT})
GOING = frozenset({pb.CODE_RESOURCE_EXHAUSTED, pb.CODE_UNAVAILABLE, pb.CODE_NOT_FOUND})
"""Failures that say nothing against the replica: it is full, going or another one by now."""
REASONS: dict[int, Reason] = {pb.CODE_DEADLINE_EXCEEDED: "timeout", pb.CODE_DATA_LOSS: "checksum"}
"""Why a replica rests; of other failures it is `error`."""


class RowsLost(ExpertMeshError):
    """The sums of `tokens` lack an expert's share, those of `degraded` are renormalised over the experts that survive;
    of the others they are right."""

    def __init__(
        self, message: str, tokens: frozenset[int], sums: torch.Tensor, degraded: frozenset[int] = frozenset()
    ) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.sums = sums
        """[T, H], of the rows' type and on their device."""
        self.degraded = degraded


class ExpertsUnavailable(RowsLost):
    """No replica served an expert for as long as the router was told to wait."""


class ExpertsLeftOut(RowsLost):
    """No row is lost, but some are degraded: whoever goes on with them must mark what comes of it."""


class DispatchRefused(RowsLost):
    """A replica calls a dispatch invalid, so that sending it again cannot help."""


@dataclass(slots=True)
class HedgeBudget:
    """Late rows may be asked for twice, but no more than a share of all dispatches: a token bucket."""

    share: float = 0.05
    burst: float = 10.0
    _tokens: float = 10.0

    def earn(self) -> None:
        self._tokens = min(self.burst, self._tokens + self.share)

    def spend(self) -> bool:
        """Whether one more is within the budget."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass(slots=True)
class Counters:
    """Since the dispatcher began."""

    resent_rows: int = 0
    hedged: int = 0
    hedges_won: int = 0
    waited: int = 0
    """Steps that found no replica for some expert."""
    degraded_rows: int = 0
    """Of layers, that went on without an expert."""


@dataclass(slots=True)
class Flight:
    """Messages sent together, and what of their answers has come."""

    batches: Sequence[ReplicaBatch]
    pending: Pending
    answers: list[Answer | None] = field(default_factory=list)

    def look(self, patience_s: float) -> None:
        self.answers = self.pending.wait(patience_s)


@dataclass(slots=True)
class Attempt:
    """Messages of one flight that together hold an ask's pairs."""

    flight: Flight
    numbers: list[int]

    @property
    def answers(self) -> list[Answer | None]:
        return [self.flight.answers[number] for number in self.numbers]

    @property
    def batches(self) -> list[ReplicaBatch]:
        return [self.flight.batches[number] for number in self.numbers]


@dataclass(slots=True)
class Ask:
    """Pairs that still need their sums, and who has been asked for them: the first of the attempts that is answered
    in full counts."""

    pairs: Pairs
    attempts: list[Attempt]
    hedged: bool = False


Part = tuple[ReplicaBatch, torch.Tensor]


class Recovery:
    """One layer of one step from the first answer that is missing until all are there."""

    def __init__(
        self,
        replicas: LiveReplicas,
        transport: Transport,
        layer: int,
        hidden_states: torch.Tensor,
        wait_s: float,
        degrade_after_s: float | None,
        budget: HedgeBudget,
        counters: Counters,
    ) -> None:
        self._replicas, self._transport = replicas, transport
        self._layer, self._hidden_states = layer, hidden_states
        self._wait_s, self._deadline = wait_s, time.monotonic() + wait_s
        self._degrade_after_s = degrade_after_s
        self.left_out: list[Pairs] = []
        """Of experts that have been missing for `degrade_after_s`."""
        self._budget, self._counters = budget, counters
        self.lost: frozenset[int] = frozenset()
        """Tokens that lack an expert's share at the end."""
        self.refused = ""
        self.unserved = ""
        """Why rows were lost: what a replica calls invalid; which experts nobody served. Empty: none for that."""
        self.overflowed: frozenset[int] = frozenset()
        """Those of `lost` whose sums two answers call no numbers."""
        self._parts: list[Part] = []
        self._asks: list[Ask] = []
        self._failed: set[str] = set()
        self._not_finite: set[tuple[int, int]] = set()
        """Pairs of token and expert whose sum was no number in one answer."""
        self._pauses = 0

    def run(self, batches: Sequence[ReplicaBatch], pending: Pending, unserved: Pairs | None) -> list[Part]:
        """The partial sums of all pairs of `batches` and `unserved`, in no order, but of those that are `lost` or
        `left_out`."""
        self._add(Flight(batches, pending))
        if unserved is not None and len(unserved.tokens):
            self._asks.append(Ask(unserved, []))
        self._look(0.0)
        while self._asks:
            homeless = [ask for ask in self._asks if not ask.attempts]
            if homeless and not self._send_again(homeless):
                self._pause(homeless)
            elif self._asks:
                self._hedge()
                self._look(self._patience_s())
        return self._parts

    def _add(self, flight: Flight) -> None:
        self._asks += [Ask(batch.pairs, [Attempt(flight, [n])]) for n, batch in enumerate(flight.batches)]

    def _flights(self) -> list[Flight]:
        """Those under way."""
        found = [attempt.flight for ask in self._asks for attempt in ask.attempts]
        return list({id(flight): flight for flight in found}.values())

    def _look(self, patience_s: float) -> None:
        """Takes what arrives within the time."""
        flights = self._flights()
        for flight in flights:
            flight.look(patience_s if len(flights) == 1 else min(patience_s, LOOK_S))
        self._asks = [ask for ask in self._asks if not self._settle(ask)]

    def _settle(self, ask: Ask) -> bool:
        """Whether an attempt has all its answers; those that failed are dropped."""
        for attempt in list(ask.attempts):
            failed = [
                (batch, answer)
                for batch, answer in zip(attempt.batches, attempt.answers, strict=True)
                if answer is not None and not self._good(batch, answer)
            ]
            for batch, answer in failed:
                self._note_failure(batch, answer)
            if any(answer.code in HOPELESS for _, answer in failed):
                self._lose(ask.pairs)
                return True
            if failed:
                ask.attempts.remove(attempt)
                continue
            outputs = [answer.output for answer in attempt.answers if answer is not None and answer.output is not None]
            if len(outputs) == len(attempt.numbers):
                self._parts += zip(attempt.batches, outputs, strict=True)
                self._blame_the_late(ask, attempt)
                return True
        return False

    def _good(self, batch: ReplicaBatch, answer: Answer) -> bool:
        """Sums that are no numbers are no answer, unless the row was none either. Where a second answer gives none for
        the same pairs, the model overflows there: their tokens are lost, since no later answer would help."""
        if answer.output is None:
            return False
        finite = torch.isfinite(answer.output).all(-1)
        if bool(finite.all()):
            return True
        given = self._hidden_states[torch.from_numpy(batch.rows).to(self._hidden_states.device)]
        overflowed = (~finite & torch.isfinite(given).all(-1).cpu()).numpy()
        concerned = overflowed[batch.pair_rows]
        pairs = batch.pairs
        keys = set(zip(pairs.tokens[concerned].tolist(), pairs.experts[concerned].tolist(), strict=True))
        if not keys <= self._not_finite:
            self._not_finite |= keys
            return False
        self.overflowed |= frozenset(batch.rows[overflowed].tolist())
        self.lost |= self.overflowed
        return True

    def _lose(self, pairs: Pairs) -> None:
        self.lost |= frozenset(pairs.tokens.tolist())

    def _note_failure(self, batch: ReplicaBatch, answer: Answer) -> None:
        what = answer.message if answer.output is None else "answered sums that are not finite"
        code = answer.code if answer.output is None else pb.CODE_INTERNAL
        reason = f"replica {batch.replica}, layer {self._layer}: {code_name(code)} {what}".rstrip()
        if code in HOPELESS:
            self.refused = reason
            return
        log.warning("%s; %d rows are sent again", reason, len(batch.rows))
        self._counters.resent_rows += len(batch.rows)
        self._failed.add(batch.replica)
        if code not in GOING:
            self._replicas.suspend(batch.replica, _reason(answer), reason)

    def _blame_the_late(self, ask: Ask, winner: Attempt) -> None:
        if not ask.hedged or winner is ask.attempts[0]:
            return
        self._counters.hedges_won += 1
        for batch, answer in zip(ask.attempts[0].batches, ask.attempts[0].answers, strict=True):
            if answer is None:
                self._replicas.suspend(batch.replica, "late", "did not answer in time, another replica did")

    def _send_again(self, homeless: Iterable[Ask]) -> bool:
        """Sends their pairs to replicas that have not failed yet; False where not one pair has such a replica."""
        pairs = _join([ask.pairs for ask in homeless])
        flight, unserved = self._send(pairs, frozenset(self._failed))
        if flight is None:
            return False
        self._asks = [ask for ask in self._asks if ask.attempts]
        self._add(flight)
        if len(unserved.tokens):
            self._asks.append(Ask(unserved, []))
        flight.look(0.0)
        return True

    def _send(self, pairs: Pairs, excluded: frozenset[str]) -> tuple[Flight | None, Pairs]:
        owners, missing = choose_replicas(pairs.counts(), self._replicas.candidates(self._layer, excluded))
        if not owners:
            return None, pairs
        batches = make_batches(self._replicas, pairs.of(frozenset(owners)) if missing else pairs, owners)
        pending = self._transport.start(self._layer, self._hidden_states, batches)
        return Flight(batches, pending), pairs.of(missing)

    def _pause(self, homeless: Sequence[Ask]) -> None:
        """Every replica of some pairs has failed them, or there is none: waits for a change, or a little."""
        seen = self._replicas.snapshot()
        pairs = _join([ask.pairs for ask in homeless])
        usable = choose_replicas(pairs.counts(), self._replicas.candidates(self._layer))[0]
        until = deadline = self._deadline
        if not usable:
            self._counters.waited += self._pauses == 0
            since = self._replicas.note_missing(self._layer, frozenset(pairs.counts()))
            if self._degrade_after_s is not None and self._leave_out(pairs, since, self._degrade_after_s):
                return
            first = min(since.values())
            deadline = min(deadline, first + self._wait_s)
            until = min(deadline, first + (self._degrade_after_s or self._wait_s))
        if time.monotonic() > deadline:
            self.unserved = self._explain(pairs)
            self._lose(pairs)
            self._asks = [ask for ask in self._asks if ask.attempts]
            return
        pause_s = min(LAST_PAUSE_S, FIRST_PAUSE_S * 2**self._pauses) * random.uniform(0.5, 1.0)
        self._pauses += 1
        self._failed.clear()
        if len(self._asks) > len(homeless):
            self._look(pause_s)
        else:
            wait_s = pause_s if usable else LAST_PAUSE_S
            self._replicas.wait_for_change(seen, max(0.0, min(wait_s, until - time.monotonic())))

    def _leave_out(self, pairs: Pairs, since: Mapping[int, float], after_s: float) -> bool:
        """Goes on without the experts that have been missing for so long; whether there are any."""
        now = time.monotonic()
        gone = frozenset(expert for expert, at in since.items() if now >= at + after_s)
        if not gone:
            return False
        self._replicas.note_left_out(self._layer, gone)
        self.left_out.append(pairs.of(gone))
        rest = pairs.of(frozenset(since) - gone)
        self._asks = [ask for ask in self._asks if ask.attempts] + ([Ask(rest, [])] if len(rest.tokens) else [])
        return True

    def _hedge(self) -> None:
        """Asks other replicas too for what is late, where they cover all of it and the budget allows it."""
        for ask in self._asks:
            if ask.hedged or not ask.attempts or ask.attempts[0].flight.pending.late_after_s() > 0:
                continue
            late = frozenset(
                batch.replica
                for batch, answer in zip(ask.attempts[0].batches, ask.attempts[0].answers, strict=True)
                if answer is None
            )
            candidates = self._replicas.candidates(self._layer, late | self._failed)
            ask.hedged = True  # one try; what comes of it is looked at once
            if choose_replicas(ask.pairs.counts(), candidates)[1] or not self._budget.spend():
                continue
            flight, _ = self._send(ask.pairs, late | self._failed)
            if flight is not None:
                self._counters.hedged += 1
                log.info("layer %d: %s late; asking another replica too", self._layer, ", ".join(sorted(late)))
                flight.look(0.0)
                ask.attempts.append(Attempt(flight, list(range(len(flight.batches)))))

    def _patience_s(self) -> float:
        """Until something may have to be done."""
        waits = [ask.attempts[0].flight.pending.late_after_s() for ask in self._asks if ask.attempts and not ask.hedged]
        return min(1.0, *waits) if waits else 1.0

    def _explain(self, failed: Pairs) -> str:
        missing = format_indices(set(failed.counts()))
        refused = "".join(f"; {address} refused: {why}" for address, why in sorted(self._replicas.refused.items()))
        return f"layer {self._layer}: no replica served experts {missing} within {self._wait_s:g} s{refused}"


def make_batches(replicas: LiveReplicas, pairs: Pairs, owners: dict[int, str]) -> list[ReplicaBatch]:
    """One batch per replica, or more where one has more rows than it takes per message."""
    live = replicas.snapshot()
    return [
        part
        for batch in (scatter(pairs, owners) if owners else [])
        for part in split(batch, live[batch.replica].max_rows if batch.replica in live else len(batch.rows))
    ]


def _reason(failure: Answer) -> Reason:
    if failure.output is not None:
        return "not_finite"
    return REASONS.get(failure.code, "error")


def _join(pairs: Sequence[Pairs]) -> Pairs:
    """In token order, as a batch wants them."""
    tokens = np.concatenate([one.tokens for one in pairs])
    order = np.argsort(tokens, kind="stable")
    return Pairs(
        tokens[order],
        np.concatenate([one.experts for one in pairs])[order],
        np.concatenate([one.weights for one in pairs])[order],
    )
