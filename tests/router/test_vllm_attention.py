"""Threads of attention alone, without an engine around. That outputs equal plain vLLM's is shown in tests/parity."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from expertmesh.config import EngineSection
from router_service.app import SPINS, environment
from router_service.connection import SETTINGS_KEY, RouterSettings

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def one_thread_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a router with one CPU, where vLLM's worker has made torch's own function do nothing."""
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def test_threads_are_more_for_as_long_as_attention_takes() -> None:
    from router_service import vllm_attention

    with mock.patch.object(vllm_attention.ThreadedAttentionBackend, "num_threads", 2):
        with vllm_attention._threads(vllm_attention.LEAST_TOKENS):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
        with vllm_attention._threads(vllm_attention.LEAST_TOKENS - 1):
            assert torch.get_num_threads() == 1
        with pytest.raises(ValueError, match="broken"), vllm_attention._threads(64):
            raise ValueError("broken")
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("threads", [None, 3])
def test_the_engines_process_uses_them_where_the_settings_say_so(threads: int | None) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from router_service.vllm_attention import ThreadedAttention, ThreadedAttentionBackend, ThreadedMetadataBuilder
    from router_service.vllm_executor import InProcessExecutor

    executor = InProcessExecutor.__new__(InProcessExecutor)
    settings = RouterSettings(attention_threads=threads).model_dump(mode="json")
    executor.vllm_config = SimpleNamespace(additional_config={SETTINGS_KEY: settings})
    attention = AttentionBackendEnum.CPU_ATTN
    found = []
    try:
        with (
            mock.patch.object(ThreadedAttentionBackend, "num_threads", 1),
            mock.patch.object(UniProcExecutor, "_init_executor", lambda _: found.append(attention.get_class())),
        ):
            executor._init_executor()
            assert ThreadedAttentionBackend.num_threads == (threads or 1)
    finally:
        attention.clear_override()
    assert found == [CPUAttentionBackend if threads is None else ThreadedAttentionBackend]
    assert ThreadedAttentionBackend.get_impl_cls() is ThreadedAttention
    assert ThreadedAttentionBackend.get_builder_cls() is ThreadedMetadataBuilder


def test_threads_that_share_cores_with_replicas_soon_sleep() -> None:
    alone, shared = EngineSection(), EngineSection(attention_threads=2)
    assert "GOMP_SPINCOUNT" not in environment(alone)
    assert environment(shared) == environment(alone) | {"GOMP_SPINCOUNT": SPINS}
    assert environment(shared.model_copy(update={"num_gpus": 1.0})) == environment(EngineSection(num_gpus=1))
