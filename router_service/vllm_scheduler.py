"""vLLM's scheduler, but requests that lack experts fail or are marked, the others go on. Written against vLLM 0.32.

A step whose experts cannot be reached ends with sums that lack something for some rows. The requests of lost rows get
no token of it, end with vLLM's finish reason `error`, and the KV cache that they wrote is used by nobody. Those of
degraded rows go on; each of their outputs is marked from then to their end, also of those that had read what they
wrote to the KV cache, and nobody else will read it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from router_service.degraded_mark import mark
from router_service.losses import Lacking

LACKING_ROWS = "expertmesh_lacking_rows"
"""Attribute of a SchedulerOutput that `InProcessExecutor` sets: Lacking, rows of its batch."""
BLOCK_HASHES = "expertmesh_block_hashes"
"""Attribute of a SchedulerOutput: of the requests in it, Hashes."""
Hashes = Mapping[str, Sequence[bytes]]
"""Request -> a hash for each block of its tokens that is full, which holds all tokens before it too."""
log = logging.getLogger(__name__)


class Sparing:
    """Mixed into a scheduler, before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._degraded: set[str] = set()
        """Requests under way whose outputs are marked."""

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Keeps the block hashes of the step's requests: those that are aborted or preempted before its output comes
        have no blocks any more that would tell who read them."""
        scheduler_output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        hashes = {one: self.requests[one].block_hashes for one in scheduler_output.num_scheduled_tokens}
        setattr(scheduler_output, BLOCK_HASHES, hashes)
        return scheduler_output

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        rows: Lacking | None = getattr(scheduler_output, LACKING_ROWS, None)
        if rows:
            self._spare(rows, scheduler_output, model_runner_output)
        results = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if self._degraded:
            for output in (output for result in results.values() for output in result.outputs):
                if output.request_id in self._degraded:
                    mark(output)
            self._degraded &= self.requests.keys()
        return results

    def _spare(self: Any, rows: Lacking, scheduler_output: Any, model_runner_output: Any) -> None:
        order, tokens = model_runner_output.req_ids, scheduler_output.num_scheduled_tokens
        before, hashes = computed_before(scheduler_output), getattr(scheduler_output, BLOCK_HASHES)
        degraded = requests_of(rows.degraded, order, tokens)
        if degraded:
            self._degrade(degraded, before, hashes)
        failed = requests_of(rows.lost, order, tokens)
        if not failed:
            return
        failed |= self._taint(failed, before, hashes)
        for request in failed & model_runner_output.req_id_to_index.keys():
            if model_runner_output.sampled_token_ids:
                model_runner_output.sampled_token_ids[model_runner_output.req_id_to_index[request]] = []
        log.warning("%d of %d requests lost rows in a step and fail", len(failed), len(self.running))
        self.grammar_compile_error_reqs |= failed  # those that end with an error after this step

    def _degrade(self: Any, degraded: set[str], before: dict[str, int], hashes: Hashes) -> None:
        others = self._taint(degraded, before, hashes)
        for request in (degraded | others) & self.requests.keys() - self._degraded:
            self._hash_apart(request, before.get(request, 0) if request in degraded else 0)
        self._degraded |= (degraded | others) & self.requests.keys()

    def _hash_apart(self: Any, request_id: str, computed: int) -> None:
        """What the request has after `computed` tokens gets hashes that no other request's tokens have."""
        request = self.requests[request_id]
        hasher = request._block_hasher
        if hasher is None:
            return
        first = computed // self.hash_block_size
        request.block_hashes[first:] = [os.urandom(32) for _ in request.block_hashes[first:]]
        request._block_hasher = lambda one: [os.urandom(32) for _ in hasher(one)]

    def _taint(self: Any, failed: set[str], before: dict[str, int], hashes: Hashes) -> set[str]:
        """Takes what these requests wrote in this step or later out of the prefix cache; the other requests that had
        read it."""
        running = {one.request_id for one in self.running}
        blocks: set[int] = set()
        for request in failed & running:
            blocks |= self._blocks_from(request, before.get(request, 0))
        gone = failed - running
        first = {one: before.get(one, 0) // self.hash_block_size for one in gone}
        lacking = {(at, hashes[one][at]) for one, at in first.items() if at < len(hashes[one])}
        others = {
            one.request_id
            for one in self.running
            if one.request_id not in failed
            and (
                any(one.block_hashes[at : at + 1] == [value] for at, value in lacking)
                or not blocks.isdisjoint(self._blocks_from(one.request_id, 0))
            )
        }
        for request in others:
            blocks |= self._blocks_from(request, before.get(request, 0))
        self.kv_cache_manager.evict_blocks(set(range(self.kv_cache_config.num_blocks)) if gone else blocks)
        return others

    def _blocks_from(self: Any, request: str, computed: int) -> set[int]:
        """Of all KV cache groups, from the one that holds the first token after `computed` on."""
        groups = zip(self.kv_cache_manager.get_block_ids(request), self.kv_cache_config.kv_cache_groups, strict=True)
        return {block for ids, group in groups for block in ids[computed // group.kv_cache_spec.block_size :]}


class SparingScheduler(Sparing, Scheduler):  # type: ignore[misc]
    pass


class SparingAsyncScheduler(Sparing, AsyncScheduler):  # type: ignore[misc]
    pass


def requests_of(rows: set[int], order: list[str], num_scheduled_tokens: dict[str, int]) -> set[str]:
    """The requests, in the batch's order, that rows of the batch belong to; rows beyond them are padding."""
    found, start = set(), 0
    for request in order:
        end = start + num_scheduled_tokens.get(request, 0)
        if any(start <= row < end for row in rows):
            found.add(request)
        start = end
    return found


def computed_before(scheduler_output: Any) -> dict[str, int]:
    """Request -> tokens of it that were in the KV cache before the step."""
    cached = scheduler_output.scheduled_cached_reqs
    known = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return known | {one.req_id: one.num_computed_tokens for one in scheduler_output.scheduled_new_reqs}
