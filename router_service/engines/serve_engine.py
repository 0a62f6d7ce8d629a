"""Ray Serve LLM's vLLM engine with the worker in the engine core's own process on CPUs. Written against Ray 2.60.

Ray Serve LLM sets the executor "mp" on CPUs, whatever the engine arguments say.
"""

from __future__ import annotations

from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

from router_service.vllm_executor import InProcessExecutor


class InProcessEngine(VLLMEngine):  # type: ignore[misc]
    def _start_async_llm_engine(self, engine_args: Any, engine_config: Any, placement_group: Any) -> Any:
        engine_config.parallel_config.distributed_executor_backend = InProcessExecutor
        return super()._start_async_llm_engine(engine_args, engine_config, placement_group)
