"""The thin engine: any of transformers' MoE models with its experts remote. All that touches its internals is here.

Written against transformers 5.19. It is the oracle of the parity tests, and runs models that vLLM does not know.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from expertmesh.artifact.manifest import QUANT_METHOD, TRUNK_DIRECTORY, read_manifest
from expertmesh.artifact.modules import find_expert_layers
from router_service.dispatcher import Dispatcher

EXPERTS_IMPLEMENTATION = "expertmesh"


class RemoteExpertsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What an artifact's trunk says under `quantization_config`."""

    def __init__(self, quant_method: str = QUANT_METHOD, **facts: Any) -> None:
        self.quant_method = quant_method
        self.facts = facts


class RemoteExpertsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Takes the parameters out of every expert module before weights are loaded, so that none are allocated."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for layer in find_expert_layers(model):
            layer.module.expertmesh_layer = layer.index
            layer.module._is_hf_initialized = True
            for name in layer.parameter_names:
                layer.module.register_parameter(name, None)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def remote_experts_forward(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [T, H], top_k_index and top_k_weights [T, K] -> [T, H]: stands in for the module's forward."""
    dispatcher: Dispatcher = module.expertmesh_dispatcher  # type: ignore[assignment]
    layer: int = module.expertmesh_layer  # type: ignore[assignment]
    return dispatcher.finish(dispatcher.start(layer, hidden_states, top_k_index, top_k_weights))


@functools.cache
def register() -> None:
    """Tells transformers of the quantization method and the experts implementation, once per process."""
    register_quantization_config(QUANT_METHOD)(RemoteExpertsConfig)
    register_quantizer(QUANT_METHOD)(RemoteExpertsQuantizer)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, remote_experts_forward)


def load_trunk(artifact: Path, dispatcher: Dispatcher, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The artifact's model without its experts, whose rows go through the dispatcher; in `dtype` or the artifact's."""
    register()
    model = AutoModelForCausalLM.from_pretrained(
        artifact / TRUNK_DIRECTORY,
        dtype=dtype or read_manifest(artifact).torch_dtype,
        experts_implementation=EXPERTS_IMPLEMENTATION,
        local_files_only=True,
    )
    for module in model.modules():
        if hasattr(module, "expertmesh_layer"):
            module.expertmesh_dispatcher = dispatcher
    return model.eval()
