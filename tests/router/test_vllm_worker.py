"""Steps in two halves, without an engine around: what each half sees, and whose rows its losses are. That outputs equal
plain vLLM's is shown in tests/parity."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from router_service.halves import away
from router_service.losses import collect, lose

pytestmark = pytest.mark.vllm

TOKENS, FIRST = 7, 4


def step() -> Any:
    """A forward context as vLLM makes it of a step in two halves."""
    halves = [SimpleNamespace(token_slice=slice(0, FIRST)), SimpleNamespace(token_slice=slice(FIRST, TOKENS))]
    return SimpleNamespace(
        ubatch_slices=halves,
        attn_metadata=[{"layer": "first"}, {"layer": "second"}],
        slot_mapping=[{}, {}],
        cudagraph_runtime_mode=no_graph(),
        batch_descriptor=None,
    )


def no_graph() -> Any:
    from vllm.config import CUDAGraphMode

    return CUDAGraphMode.NONE


def forward(model: Any) -> torch.Tensor:
    """The step's outputs, by a runner of which only this model exists."""
    from vllm import forward_context

    from router_service.vllm_worker import OverlappingModelRunner

    runner = OverlappingModelRunner.__new__(OverlappingModelRunner)
    compilation = SimpleNamespace(static_forward_context={}, fast_moe_cold_start=False)
    runner.vllm_config = SimpleNamespace(compilation_config=compilation)
    runner.model = model
    whole = step()
    with forward_context.override_forward_context(whole):
        output: torch.Tensor = runner._model_forward(input_ids=torch.arange(TOKENS), positions=torch.arange(TOKENS))
        assert forward_context.get_forward_context() is whole
    return output


def test_each_half_sees_its_tokens_and_its_context_all_the_way() -> None:
    from vllm import forward_context
    from vllm.v1.worker.ubatching import dbo_current_ubatch_id, dbo_enabled

    seen: list[Any] = []

    def model(input_ids: torch.Tensor, **more: Any) -> torch.Tensor:
        for _ in range(3):
            context = forward_context.get_forward_context()
            seen.append((input_ids.tolist(), context.attn_metadata["layer"], dbo_current_ubatch_id()))
            with away():
                pass
        return input_ids[:, None] * 2

    assert forward(model).flatten().tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert seen == [([0, 1, 2, 3], "first", 0), ([4, 5, 6], "second", 1)] * 3
    assert not dbo_enabled()


def test_rows_that_a_half_loses_are_the_steps() -> None:
    def model(input_ids: torch.Tensor, **more: Any) -> torch.Tensor:
        with away():
            assert lose([1], degraded=[2])
        return input_ids

    with collect() as lacking:
        forward(model)
    assert (lacking.lost, lacking.degraded) == ({1, FIRST + 1}, {2, FIRST + 2})
    with collect() as lacking:
        assert lose([1])  # the step that comes next
    assert lacking.lost == {1}


def test_a_half_that_fails_is_an_error_once_both_have_ended() -> None:
    ended: list[int] = []

    def model(input_ids: torch.Tensor, **more: Any) -> torch.Tensor:
        with away():
            if 0 in input_ids:
                raise ValueError("no experts")
        ended.extend(input_ids.tolist())
        return input_ids

    with pytest.raises(ValueError, match="no experts"):
        forward(model)
    assert ended == [4, 5, 6]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"lora_config": object()}, False),
        ({"speculative_config": object()}, False),
        ({"kv_transfer_config": object()}, False),
        ({"is_pooling_model": True}, False),
        ({"supports_mm_inputs": True}, False),
        ({"kv_cache": "mamba"}, False),
        ({"kv_cache": "rswa"}, False),
    ],
)
def test_what_vllm_lays_out_for_all_rows_at_once_is_not_split(changed: dict[str, Any], expected: bool) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, RSWASpec

    from router_service.vllm_worker import OverlappingModelRunner

    shape = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    specs = {
        "attention": FullAttentionSpec(**shape),
        "rswa": RSWASpec(**shape, rswa_window=32),
        "mamba": MambaSpec(block_size=16, shapes=((1,),), dtypes=(torch.float32,)),
    }
    config = {"lora_config": None, "speculative_config": None, "kv_transfer_config": None} | changed
    spec = specs[changed.get("kv_cache", "attention")]
    runner = OverlappingModelRunner.__new__(OverlappingModelRunner)
    runner.vllm_config = SimpleNamespace(**config, model_config=SimpleNamespace(is_encoder_decoder=False))
    runner.is_pooling_model = changed.get("is_pooling_model", False)
    runner.supports_mm_inputs = changed.get("supports_mm_inputs", False)
    runner.kv_cache_config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
    assert runner._splittable() is expected
