"""vLLM's worker in the engine's own process, also on a CPU. Written against vLLM 0.32.

On a CPU, vLLM turns the executor "uni" into "mp", since it sets the worker's OpenMP threads by environment variables:
a process more, and an exchange with it in every step that spins on a core. The router sets these variables itself.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.executor.uniproc_executor import UniProcExecutor

from router_service import losses
from router_service.connection import SETTINGS_KEY, RouterSettings
from router_service.metrics import SUSPENSIONS
from router_service.remote_op import dispatchers
from router_service.vllm_scheduler import LACKING_ROWS

WARM_UPS = ("determine_available_memory", "compile_or_warm_up_model")
"""Of the worker: steps with rows of nobody's."""


class InProcessExecutor(UniProcExecutor):  # type: ignore[misc]
    """The same; vLLM leaves classes given by name alone."""

    def _init_executor(self) -> None:
        settings = RouterSettings.model_validate(self.vllm_config.additional_config.get(SETTINGS_KEY, {}))
        if settings.attention_threads is not None:
            from router_service.vllm_attention import use_threads  # for CPUs alone

            use_threads(settings.attention_threads)
        super()._init_executor()

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Answers the front end, which asks by this way what the engine's process alone knows. In degraded mode a
        router starts without the experts that are missing."""
        if method == SUSPENSIONS:
            return [one.replicas.suspensions() for one in dispatchers()]
        if method in WARM_UPS:
            with losses.collect(takes_lost=False):
                return super().collective_rpc(method, *args, **kwargs)
        return super().collective_rpc(method, *args, **kwargs)

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Tells the scheduler which rows of the step were lost or degraded."""
        with losses.collect() as lacking:
            output = super().execute_model(scheduler_output, non_block)
        if lacking:
            setattr(scheduler_output, LACKING_ROWS, lacking)
        return output
