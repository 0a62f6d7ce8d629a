"""vLLM's own MoE layers, as its models build them, for `executor`. Written against vLLM 0.32."""

from __future__ import annotations

import functools

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts


@functools.cache
def _one_rank() -> None:
    """Once per process, inside a config."""
    init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
    ensure_model_parallel_initialized(1, 1)


def make_layers(gate_up: torch.Tensor, down: torch.Tensor) -> list[RoutedExperts]:
    """L layers of top-1 experts, of gate_up [L, E, 2I, H] and down [L, E, H, I], in vLLM's packed form."""
    with set_current_vllm_config(VllmConfig()):
        _one_rank()
        return [
            _make_layer(f"layers.{number}.experts", *weights)
            for number, weights in enumerate(zip(gate_up, down, strict=True))
        ]


def _make_layer(name: str, gate_up: torch.Tensor, down: torch.Tensor) -> RoutedExperts:
    runner = FusedMoEFactory(
        num_experts=len(down), top_k=1, hidden_size=down.shape[1], intermediate_size=down.shape[2],
        params_dtype=down.dtype, renormalize=False, prefix=name,
    )  # fmt: skip
    experts: RoutedExperts = runner.routed_experts
    experts.w13_weight.data.copy_(gate_up)
    experts.w2_weight.data.copy_(down)
    experts.quant_method.process_weights_after_loading(experts)
    return experts


def call_layer(
    layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """As vLLM's runner calls it: x [P, H], weights and ids [P, 1] -> [P, H]."""
    output: torch.Tensor = layer.forward_modular(
        x=x, topk_weights=topk_weights, topk_ids=topk_ids, shared_experts=None, shared_experts_input=None
    )
    return output
