"""vLLM's scheduler, but for requests that lost rows in a step: these fail, the others go on. Written against vLLM 0.32.

A step whose experts cannot be reached ends with sums that lack something for some rows. The requests of these rows get
no token of it, end with vLLM's finish reason `error`, and the KV cache that they wrote is used by nobody.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

LOST_ROWS = "expertmesh_lost_rows"
"""Attribute of a SchedulerOutput that `InProcessExecutor` sets: rows of its batch."""
log = logging.getLogger(__name__)


class Sparing:
    """Mixed into a scheduler, before it."""

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        rows = getattr(scheduler_output, LOST_ROWS, None)
        if rows:
            failed = requests_of(rows, model_runner_output.req_ids, scheduler_output.num_scheduled_tokens)
            failed |= self._taint(failed, computed_before(scheduler_output))
            for request in failed & model_runner_output.req_id_to_index.keys():
                if model_runner_output.sampled_token_ids:
                    model_runner_output.sampled_token_ids[model_runner_output.req_id_to_index[request]] = []
            log.warning("%d of %d requests lost rows in a step and fail", len(failed), len(self.running))
            self.grammar_compile_error_reqs |= failed  # those that end with an error after this step
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def _taint(self: Any, failed: set[str], before: dict[str, int]) -> set[str]:
        """Takes what the failed requests wrote out of the prefix cache; the other requests that had read it."""
        blocks: set[int] = set()
        for request in failed & self.requests.keys():
            blocks |= self._blocks_from(request, before.get(request, 0))
        others = {
            one.request_id
            for one in self.running
            if one.request_id not in failed and not blocks.isdisjoint(self._blocks_from(one.request_id, 0))
        }
        for request in others:
            blocks |= self._blocks_from(request, before.get(request, 0))
        self.kv_cache_manager.evict_blocks(blocks)
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
