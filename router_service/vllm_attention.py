"""vLLM's attention on CPUs with a number of threads of its own. Written against vLLM 0.32.

With many requests it takes most of a router's step, and spends it on waiting for memory. Where replicas have the same
cores, they have nothing to do meanwhile: a second thread may have theirs. What each thread does is settled where a
step's metadata is made, by how many there are then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch._C import set_num_threads  # that of `torch` does nothing in vLLM's worker
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

LEAST_TOKENS = 12
"""With fewer tokens in a step, waking the others takes as long as they help."""


class ThreadedAttentionBackend(CPUAttentionBackend):  # type: ignore[misc]  # vLLM leaves classes given by name alone
    num_threads: ClassVar[int] = 1

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return ThreadedAttention

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return ThreadedMetadataBuilder


class ThreadedMetadataBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        with _threads(common_attn_metadata.num_actual_tokens):
            return super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)


class ThreadedAttention(CPUAttentionBackendImpl):  # type: ignore[misc]
    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        with _threads(0 if attn_metadata is None else attn_metadata.num_actual_tokens):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

    def do_kv_cache_update(self, layer: Any, key: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        with _threads(len(key)):
            super().do_kv_cache_update(layer, key, *args, **kwargs)


def use_threads(count: int) -> None:
    """In this process, for models that are loaded from now on."""
    ThreadedAttentionBackend.num_threads = count
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{ThreadedAttentionBackend.__qualname__}")


@contextmanager
def _threads(tokens: int) -> Iterator[None]:
    if tokens < LEAST_TOKENS:
        yield
        return
    others = torch.get_num_threads()
    set_num_threads(ThreadedAttentionBackend.num_threads)
    try:
        yield
    finally:
        set_num_threads(others)
