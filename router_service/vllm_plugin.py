"""vLLM's side of the router: routed experts whose weights are elsewhere. All that touches vLLM's internals is here.

Written against vLLM 0.32. The entry point `vllm.general_plugins` calls `register` in each of vLLM's processes; an
artifact's trunk names the method in its `quantization_config`, so it loads with no flag.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.config import CompilationConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts, SharedExpertsOrder
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import extract_layer_index

from expertmesh.artifact.manifest import QUANT_METHOD
from expertmesh.errors import ConfigError
from router_service import vllm_logs
from router_service.connection import SETTINGS_KEY, RouterSettings, connect
from router_service.remote_op import OPERATORS, register_model


def skip_weight(*args: Any, **kwargs: Any) -> bool:
    """Stands in for a weight loader: what is loaded here is nobody's."""
    return True


skip_weight.supports_moe_loading = True  # type: ignore[attr-defined]


class RemoteExperts(FusedMoEMethodBase):  # type: ignore[misc]
    """One MoE layer's method: dispatches rows instead of multiplying them."""

    def __init__(self, moe: FusedMoEConfig, layer: int, fingerprint: str, settings: RouterSettings) -> None:
        super().__init__(moe)
        self._layer = layer
        self._fingerprint = fingerprint
        register_model(fingerprint, functools.partial(connect, settings, fingerprint))

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        """`apply` computes the shared experts itself, while the routed rows are away."""
        return True

    @property
    def topk_indices_dtype(self) -> torch.dtype | None:
        return torch.int32

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        for name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias"):
            parameter = torch.nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            parameter.weight_loader = skip_weight  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *args: Any
    ) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> FusedMoEQuantConfig | None:
        return None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: SharedExperts | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [T, H], topk_weights and topk_ids [T, K] -> [T, H]."""
        rows = (x, topk_weights, topk_ids, self._layer, self._fingerprint)
        summed: torch.Tensor
        if shared_experts is None:
            summed = torch.ops.expertmesh.experts(*rows)
        else:
            ticket = torch.ops.expertmesh.start(*rows)
            shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
            summed = torch.ops.expertmesh.finish(ticket, x)
        return summed


class RemoteExpertsConfig(QuantizationConfig):  # type: ignore[misc]
    """At module level, since it is pickled to the engine's process."""

    def __init__(self, fingerprint: str) -> None:
        super().__init__()
        self.fingerprint = fingerprint

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RemoteExpertsConfig:
        return cls(config["fingerprint"])

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            return self._remote_experts(layer, prefix)
        return None

    def _remote_experts(self, layer: RoutedExperts, prefix: str) -> RemoteExperts:
        vllm_config = get_current_vllm_config()
        if vllm_config.parallel_config.world_size > 1:
            raise ConfigError("engine.kwargs: the trunk runs on one device; scale it with engine.max_replicas")
        if layer.apply_router_weight_on_input:
            raise ConfigError(f"{prefix}: experts whose input is weighted by the gate are not supported")
        _split_graphs(vllm_config.compilation_config)
        settings = RouterSettings.model_validate(vllm_config.additional_config.get(SETTINGS_KEY, {}))
        return RemoteExperts(layer.moe_config, extract_layer_index(prefix), self.fingerprint, settings)


def _split_graphs(compilation: CompilationConfig) -> None:
    """Where vLLM compiles the model in pieces, ends a piece at every dispatch: no CUDA graph may hold one."""
    if compilation.splitting_ops:
        compilation.splitting_ops += [name for name in OPERATORS if name not in compilation.splitting_ops]


def register() -> None:
    """The entry point; vLLM calls it once in every process."""
    vllm_logs.show()
    register_quantization_config(QUANT_METHOD)(RemoteExpertsConfig)
