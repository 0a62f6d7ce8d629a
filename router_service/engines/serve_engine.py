"""Ray Serve LLM's vLLM engine with the worker in the engine core's own process. Written against Ray 2.60.

Ray Serve LLM sets the executor "mp" on CPUs, whatever the engine arguments say. Executor and scheduler are ours: a step
that lost rows fails their requests alone, one that went on without an expert marks their responses.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from vllm.exceptions import RetryableRequestError
from vllm.v1.engine.exceptions import EngineDeadError

from router_service.degraded_mark import marked, watch
from router_service.metrics import SuspensionMetrics, follow_suspensions
from router_service.vllm_executor import InProcessExecutor
from router_service.vllm_scheduler import SparingAsyncScheduler, SparingScheduler


class ExpertsAway(RetryableRequestError, ValueError):  # type: ignore[misc]
    """A request lost rows. vLLM answers it with 503; Ray Serve LLM passes on what is a ValueError and no other.

    vLLM's finish reason is the same where a grammar and other demands of a request leave no token."""


def raise_if_error(finish_reason: str | None, request_id: str) -> None:
    if finish_reason == "error":
        causes = "experts that it needs are not served now, or its demands leave no token"
        raise ExpertsAway(f"request {request_id} got no token: {causes}")


class InProcessEngine(VLLMEngine):  # type: ignore[misc]
    async def start(self) -> None:
        await super().start()
        watch(self._engine_client.output_processor)
        self._follower = asyncio.create_task(self._follow())
        for serving in (self._oai_serving_chat, self._oai_serving_completion):
            if serving is not None:
                serving._raise_if_error = raise_if_error

    async def shutdown(self) -> None:
        self._follower.cancel()
        await super().shutdown()

    async def _follow(self) -> None:
        with contextlib.suppress(EngineDeadError):  # Ray Serve's health check sees to that
            await follow_suspensions(self._engine_client.collective_rpc, SuspensionMetrics())

    async def chat(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for response in marked(super().chat(*args, **kwargs)):
            yield response

    async def completions(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for response in marked(super().completions(*args, **kwargs)):
            yield response

    def _start_async_llm_engine(self, engine_args: Any, engine_config: Any, placement_group: Any) -> Any:
        engine_config.parallel_config.distributed_executor_backend = InProcessExecutor
        scheduling = engine_config.scheduler_config
        scheduling.scheduler_cls = SparingAsyncScheduler if scheduling.async_scheduling else SparingScheduler
        return super()._start_async_llm_engine(engine_args, engine_config, placement_group)
