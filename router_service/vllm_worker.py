"""vLLM's worker on a CPU, with dual-batch overlap (DBO): large steps run as two halves, one of which computes the trunk
while the rows of the other are with experts. Written against vLLM 0.32.

vLLM has it for its all-to-all kernels on GPUs, and turns it off on CPUs; how steps are split, and which must not be,
is vLLM's here too. MegaScale-Infer (arXiv:2504.02263) calls the same a ping-pong pipeline.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from vllm import forward_context
from vllm.forward_context import ForwardContext, create_forward_context, get_forward_context
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.worker import ubatching
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.ubatch_utils import check_ubatch_thresholds

from router_service import losses
from router_service.halves import Turns

log = logging.getLogger(__name__)

IN_TWO_CALLS = frozenset({FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec})
"""Kinds of KV cache whose layers may be given a request's tokens in two calls, one after the other; not what derives
from them, which may need more of a step than vLLM keeps where it splits one."""
SECOND = ThreadPoolExecutor(1, "second-half")


class OverlappingWorker(CPUWorker):  # type: ignore[misc]  # vLLM leaves classes given by name alone
    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        # a copy: the engine validates its own again, which turns DBO off on CPUs
        own = copy.copy(vllm_config)
        own.parallel_config = copy.copy(vllm_config.parallel_config)
        own.parallel_config.enable_dbo = True
        super().__init__(own, *args, **kwargs)

    def init_device(self) -> None:
        """The CPU worker names the class of its runner itself."""
        super().init_device()
        if type(self.model_runner) is CPUModelRunner:
            self.model_runner.__class__ = OverlappingModelRunner
        else:
            log.warning("no dual-batch overlap: vLLM's runner is %s", type(self.model_runner).__qualname__)


class OverlappingModelRunner(CPUModelRunner):  # type: ignore[misc]
    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        return super()._dummy_run(*args, **kwargs | {"allow_microbatching": False})

    def _determine_batch_execution_and_padding(
        self, num_tokens: int, num_reqs: int, *args: Any, allow_microbatching: bool = True, **kwargs: Any
    ) -> Any:
        """Whether the step is split is the third of its results; vLLM's own says so with data-parallel ranks alone."""
        mode, batch, _, *others = super()._determine_batch_execution_and_padding(
            num_tokens, num_reqs, *args, allow_microbatching=allow_microbatching, **kwargs
        )
        enough = check_ubatch_thresholds(self.parallel_config, num_tokens, uniform_decode=num_tokens == num_reqs)
        return mode, batch, allow_microbatching and enough and num_tokens > 1 and self._splittable(), *others

    def _splittable(self) -> bool:
        """Not with what vLLM lays out for all rows of a step at once."""
        config = self.vllm_config
        if self.is_pooling_model or self.supports_mm_inputs or config.model_config.is_encoder_decoder:
            return False
        if config.lora_config or config.speculative_config or config.kv_transfer_config:
            return False
        groups = self.kv_cache_config.kv_cache_groups
        return all(type(spec) in IN_TWO_CALLS for group in groups for spec in _specs(group.kv_cache_spec))

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        step = get_forward_context()
        if step.ubatch_slices is None:
            return super()._model_forward(input_ids, positions, intermediate_tensors, inputs_embeds, **model_kwargs)
        turns, (lacking, _) = Turns(), losses.collected()

        def compute(half: int) -> Any:
            tokens = step.ubatch_slices[half].token_slice
            context = create_forward_context(
                step.attn_metadata[half],
                self.vllm_config,
                cudagraph_runtime_mode=step.cudagraph_runtime_mode,
                batch_descriptor=step.batch_descriptor,
                slot_mapping=step.slot_mapping[half],
            )
            with (
                torch.inference_mode(),
                losses.share(lacking, tokens.start),
                _numbered(half),
                turns.of(half, partial(_use, context)),
            ):
                return self.model(
                    input_ids=None if input_ids is None else input_ids[tokens],
                    positions=None if positions is None else positions[..., tokens],
                    intermediate_tensors=intermediate_tensors,
                    inputs_embeds=None if inputs_embeds is None else inputs_embeds[tokens],
                    **model_kwargs,
                )

        second = SECOND.submit(compute, 1)
        try:
            return torch.cat([compute(0), second.result()])
        finally:
            wait([second])
            _use(step)


def _use(context: ForwardContext) -> None:
    forward_context._forward_context = context


@contextmanager
def _numbered(half: int) -> Iterator[None]:
    """vLLM's shared experts keep an output for each half, and ask which one the thread is of."""
    thread = threading.get_ident()
    ubatching._THREAD_ID_TO_CONTEXT[thread] = half
    try:
        yield
    finally:
        del ubatching._THREAD_ID_TO_CONTEXT[thread]


def _specs(spec: KVCacheSpec) -> list[KVCacheSpec]:
    return list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
