"""The expert tier as a target: dispatches of synthetic rows straight to the replicas that a directory lists.

One request is one MoE layer's dispatch: R rows, each to K experts, one message per replica touched. A dispatch that
fails is not sent again, other than a router's: a run shows what the tier itself does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy

from expertmesh.directory.client import list_table, watch
from expertmesh.directory.table import merge
from expertmesh.errors import ClusterError
from expertmesh.experts import format_indices
from expertmesh.v1 import directory_pb2
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.status import code_name
from expertmesh.wire.tls import CurrentTls, TlsFiles
from loadtest.config import RunConfig
from loadtest.dispatches import Indices, Model, random_rows, request_for, split, wanted_layers
from loadtest.records import Status
from loadtest.replica_link import ReplicaLink, model_of
from loadtest.skew import ExpertSampler
from loadtest.target import Clock, Outcome, Request

DEFAULT_TOP_K = 2
STATUSES: dict[int, Status] = {
    pb.CODE_OK: "ok",
    pb.CODE_INVALID_ARGUMENT: "rejected",
    pb.CODE_NOT_FOUND: "rejected",
    pb.CODE_RESOURCE_EXHAUSTED: "rejected",
    pb.CODE_UNAVAILABLE: "refused",
    pb.CODE_DEADLINE_EXCEEDED: "timeout",
    pb.CODE_INTERNAL: "server_error",
}


class ExpertTier:
    """Lives on one event loop; follows the directory while it is open."""

    def __init__(self, config: RunConfig, table_address: str, process: int, tls: TlsFiles | None = None) -> None:
        self._config = config
        self._files = tls
        self._address = table_address
        self._timeout_s = config.target.timeout_s
        self._tls: CurrentTls | None = None
        self._top_k = config.rows.top_k or DEFAULT_TOP_K
        self._links: dict[str, ReplicaLink] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Raises ClusterError where the directory or all replicas are silent or experts are missing, and ConfigError
        where the run asks for layers or a skew that the model has not."""
        self._tls = CurrentTls(self._files) if self._files else None
        table = await asyncio.to_thread(list_table, self._address, tls=self._files)
        if not table.replicas:
            raise ClusterError(f"directory at {self._address}: it lists no replica")
        experts = wanted_layers(table, self._config.rows.layers)
        self._sampler = ExpertSampler(self._config.rows.skew, experts, self._top_k, self._config.seed)
        self._layers = sorted(experts)
        self._follow(table)
        try:
            described = await model_of(list(self._links.values()))
        except ClusterError:
            await self._close_links()
            raise
        pool = random_rows(described.hidden_size, described.dtype, self._config.seed)
        self.model = Model(described.hidden_size, described.dtype, experts, pool)
        self._follower = asyncio.create_task(self._follow_for_ever(table))

    def prepare(self, request: Request) -> Dispatch:
        layer = self._layers[request.index % len(self._layers)]
        chosen = self._sampler.draw(layer, request.scheduled_s, request.prompt_tokens, request.seed)
        return Dispatch(self, layer, chosen, self._timeout_s)

    async def close(self) -> None:
        self._follower.cancel()
        await asyncio.wait([self._follower])
        await self._close_links()

    def replicas_for(self, layer: int) -> dict[int, ReplicaLink]:
        """Expert -> the replica to ask for it now: of those that hold it the one with the fewest rows under way."""
        usable = [link for link in self._links.values() if link.ready and link.connected]
        usable.sort(key=lambda link: link.rows_under_way, reverse=True)
        return {expert: link for link in usable for expert in link.layers.get(layer, ())}

    def _follow(self, table: directory_pb2.Table) -> None:
        listed = {entry.replica_id: entry for entry in table.replicas}
        for replica_id in self._links.keys() - listed.keys():
            closing = asyncio.create_task(self._links.pop(replica_id).close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        for replica_id, entry in listed.items():
            if replica_id in self._links:
                self._links[replica_id].ready = entry.state == pb.REPLICA_STATE_READY
            else:
                self._links[replica_id] = ReplicaLink(entry, self._tls)

    async def _follow_for_ever(self, table: directory_pb2.Table) -> None:
        async for received in watch(self._address, self._files):
            table = merge(table, received)
            self._follow(table)

    async def _close_links(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links.values()), *self._closing)


@dataclass
class Dispatch:
    """One dispatch that is ready to go. `chosen` [R, K] are its rows' experts."""

    tier: ExpertTier
    layer: int
    chosen: Indices
    timeout_s: float
    sent_s: float = 0.0
    waiting: list[asyncio.Future[pb.DispatchResponse]] = field(default_factory=list)

    async def run(self, clock: Clock) -> Outcome:
        self.sent_s = clock.now()
        replicas = self.tier.replicas_for(self.layer)
        missing = set(self.chosen.ravel().tolist()) - replicas.keys()
        if missing:
            return self._failed(clock, "refused", f"layer {self.layer}: no replica for {format_indices(missing)}")
        for link, chosen in split(self.chosen, replicas):
            self.waiting.append(link.send(request_for(self.tier.model, self.layer, chosen, self.timeout_s)))
        try:
            async with asyncio.timeout(self.timeout_s):
                answers = await asyncio.gather(*self.waiting)
        except TimeoutError:
            return self._failed(clock, "timeout", f"no answer within {self.timeout_s:g} s")
        except ConnectionError as error:
            return self._failed(clock, "disconnected", str(error))
        finally:
            for future in self.waiting:
                future.cancel()
        for answer in answers:
            if answer.status.code != pb.CODE_OK:
                status = STATUSES.get(answer.status.code, "bad_answer")
                return self._failed(clock, status, f"{code_name(answer.status.code)}: {answer.status.message}")
        now, rows = clock.now(), len(self.chosen)
        return Outcome(self.sent_s, (now,), now, rows, rows, "ok")

    def partial(self, clock: Clock) -> Outcome:
        return self._failed(clock, "unfinished", "")

    def _failed(self, clock: Clock, status: Status, error: str) -> Outcome:
        return Outcome(self.sent_s, (), clock.now(), len(self.chosen), 0, status, error)


def rows_asked(
    config: RunConfig, table_address: str, requests: Iterable[Request], tls: TlsFiles | None = None
) -> dict[tuple[int, int], int]:
    """(layer, expert) -> rows that these requests send there, drawn again as the clients draw them."""
    experts = wanted_layers(list_table(table_address, tls=tls), config.rows.layers)
    top_k = config.rows.top_k or DEFAULT_TOP_K
    sampler, layers = ExpertSampler(config.rows.skew, experts, top_k, config.seed), sorted(experts)
    totals = {layer: numpy.zeros(count, dtype=numpy.int64) for layer, count in experts.items()}
    for request in requests:
        layer = layers[request.index % len(layers)]
        chosen = sampler.draw(layer, request.scheduled_s, request.prompt_tokens, request.seed)
        totals[layer] += numpy.bincount(chosen.ravel(), minlength=experts[layer])
    return {(layer, expert): rows for layer, found in totals.items() for expert, rows in enumerate(found.tolist())}
