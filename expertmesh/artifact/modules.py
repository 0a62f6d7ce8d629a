"""transformers' expert modules: where a model has them, what they compute, how their parameters are laid out.

Every class under `use_experts_implementation` says in four attributes how its stacked parameters are laid out, and
computes act(x W_up) W_down, with `_apply_gate` between the products where it is gated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.activations import ACT2CLS

from expertmesh.artifact.checkpoint import CONFIG_FILE, Checkpoint
from expertmesh.artifact.experts import ExpertWeights
from expertmesh.errors import ArtifactError

CONFIG_ERRORS = (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, RuntimeError, ZeroDivisionError)
"""What transformers raises, depending on the class, where a config's values are impossible."""
LAYOUT_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """The experts of one decoder layer; `module` is on the meta device."""

    index: int
    name: str
    module: Any

    @property
    def class_name(self) -> str:
        return type(self.module).__name__

    @property
    def parameter_names(self) -> list[str]:
        """Names within the module, in the order of `ExpertWeights`' fields."""
        first = "gate_up_proj" if self.module.has_gate else "up_proj"
        return [first, "down_proj"] + ([f"{first}_bias", "down_proj_bias"] if self.module.has_bias else [])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the stacked parameters, experts first, by their names within the module."""
        return {name: tuple(self.module.get_parameter(name).shape) for name in self.parameter_names}

    @property
    def num_experts(self) -> int:
        return self.shapes["down_proj"][0]

    @property
    def sizes(self) -> tuple[int, int]:
        """Hidden and intermediate size."""
        _, rows, columns = self.shapes["down_proj"]
        return (columns, rows) if self.module.is_transposed else (rows, columns)

    def split(self, parameters: Mapping[str, torch.Tensor]) -> list[ExpertWeights]:
        """Stacked parameters in the module's layout -> one ExpertWeights per expert, as views where they can be."""
        up, down, *biases = (parameters[name] for name in self.parameter_names)
        if self.module.is_transposed:
            up, down = up.mT, down.mT
        parts = [self._gate_first(up), down]
        if biases:
            parts += [self._gate_first(biases[0]), biases[1]]
        return [ExpertWeights(*each) for each in zip(*parts, strict=True)]

    def _gate_first(self, stacked: torch.Tensor) -> torch.Tensor:
        if not self.module.has_gate or self.module.is_concatenated:
            return stacked
        return torch.cat([stacked[:, 0::2], stacked[:, 1::2]], dim=1)

    def gate_as_module(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The module's own step between its products, of [R, 2I] with gate first: [R, I]."""
        if self.module.has_gate and not self.module.is_concatenated:
            gate_up = torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2)
        step: Callable[[torch.Tensor], torch.Tensor]
        step = self.module._apply_gate if self.module.has_gate else self.module.act_fn
        return step(gate_up)

    def materialise(self, parameters: Mapping[str, torch.Tensor]) -> Any:
        """transformers' module with `parameters` in fp32, of as many experts as they hold."""
        module = deepcopy(self.module, {id(self.module.config): self.module.config})
        for name in self.parameter_names:
            setattr(module, name, nn.Parameter(parameters[name].float(), requires_grad=False))
        return module


def build_on_meta(checkpoint: Checkpoint) -> PreTrainedModel:
    """The checkpoint's model without memory for its parameters; raises ArtifactError where transformers can't."""
    path = checkpoint.directory / CONFIG_FILE
    architectures = checkpoint.config.get("architectures") or []
    if len(architectures) != 1:
        raise ArtifactError(f"{path}: architectures must name one class, not {architectures}")
    model_class = getattr(transformers, str(architectures[0]), None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ArtifactError(f"{path}: transformers {transformers.__version__} has no {architectures[0]}")
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False, local_files_only=True)
        config._experts_implementation = "eager"
        with torch.device("meta"):
            return model_class(config).eval()
    except (StrictDataclassError, *CONFIG_ERRORS) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArtifactError(f"{path}: {architectures[0]} can't be built from it: {reason}") from None


def find_expert_layers(model: PreTrainedModel) -> list[ExpertLayer]:
    """In the order of layers; raises ArtifactError where there are none or they differ in shape or kind."""
    layers: dict[int, ExpertLayer] = {}
    for name, module in model.named_modules():
        if not all(hasattr(module, attribute) for attribute in LAYOUT_ATTRIBUTES):
            continue
        layer = ExpertLayer(_layer_index(name), name, module)
        unknown = {key for key, _ in module.named_parameters()} ^ set(layer.parameter_names)
        if unknown:
            raise ArtifactError(f"{layer.class_name}: parameters {sorted(unknown)} are not those of a known layout")
        if layer.index in layers:
            raise ArtifactError(f"{layer.class_name}: {layers[layer.index].name} and {name} are in the same layer")
        layers[layer.index] = layer
    if not layers:
        raise ArtifactError(f"{type(model).__name__} is no mixture of experts that transformers can dispatch")
    kinds = {(layer.class_name, layer.sizes) for layer in layers.values()}
    if len(kinds) > 1:
        raise ArtifactError(f"{type(model).__name__}: experts differ from layer to layer: {sorted(kinds)}")
    return [layers[index] for index in sorted(layers)]


def activation_names(module: Any) -> list[str]:
    """Names in ACT2FN that may be the module's activation, those that its config mentions first."""
    act = getattr(module, "act_fn", None)
    mentioned = [v for v in module.config.to_dict().values() if isinstance(v, str) and v in ACT2CLS]
    kinds = {name: kind[0] if isinstance(kind, tuple) else kind for name, kind in ACT2CLS.items()}
    return list(dict.fromkeys(name for name in [*mentioned, *ACT2CLS] if kinds[name] is type(act)))


def _layer_index(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise ArtifactError(f"{name}: an experts module outside a list of decoder layers is not supported")
    return numbers[0]
