"""Which tensors of a checkpoint become which parameters, by transformers' own weight conversion.

All that touches transformers' loading internals is here; it follows `convert_and_load_state_dict_in_model`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from expertmesh.errors import ArtifactError


@dataclass(frozen=True)
class ParameterSource:
    """The tensors that make one parameter or, where a converter splits, several."""

    targets: tuple[str, ...]
    converter: Any | None
    """transformers' WeightConverter; None where the one tensor is the parameter."""
    keys: dict[str, list[str]] = field(default_factory=dict)
    """The checkpoint's names in natural order, by the converter's pattern that they match."""

    @property
    def by_expert(self) -> bool:
        """Whether each pattern has one tensor per expert, so that any range of experts converts on its own."""
        if self.converter is None:
            return False
        first = self.converter.operations[0]
        return isinstance(first, MergeModulelist) and first.dim == 0

    def convert(self, tensors: Mapping[str, list[torch.Tensor]], model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Parameters by their full names, from tensors by pattern."""
        if self.converter is None:
            ((tensor,),) = tensors.values()
            return {self.targets[0]: tensor}
        converter = deepcopy(self.converter)
        for pattern, parts in tensors.items():
            for key, part in zip(self.keys[pattern], parts, strict=False):
                converter.add_tensor(self.targets[0], key, pattern, part)
        made = converter.convert(self.targets[0], model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def missing_expert(self, count: int) -> str | None:
        """The first expert below `count` with no tensor, and its name's pattern; only where `by_expert`."""
        for pattern in self.converter.source_patterns if self.converter else ():
            numbered = re.compile(pattern.replace("*.", r"(\d+)\."))
            found = [int(match[1]) for key in self.keys.get(pattern, []) if (match := numbered.search(key))]
            if found != list(range(count)):
                absent = next((index for index in range(count) if index not in found), count)
                return f"expert {absent} of {count}: " + (
                    f"no tensor {pattern.replace('*', str(absent))}"
                    if absent < count
                    else "one more than the config has"
                )
        return None


@dataclass(frozen=True)
class SourceMap:
    experts: dict[str, ParameterSource]
    """By the name of the expert parameter."""
    trunk: list[str]
    """Names in the checkpoint, naturally ordered."""


def map_sources(model: PreTrainedModel, keys: Iterable[str], expert_parameters: Collection[str]) -> SourceMap:
    """Divides a checkpoint's tensors into those of `expert_parameters` (full names) and the trunk's.

    Experts of layers that the model does not have (as of multi-token prediction) are in neither. Raises ArtifactError
    where the model has a parameter that no tensor makes.
    """
    transforms = get_model_conversion_mapping(model)
    converters = {p: t for t in transforms if isinstance(t, WeightConverter) for p in t.source_patterns}
    state = model.state_dict()
    shapes_of_names = {_without_numbers(name) for name in expert_parameters}
    sources: dict[str, ParameterSource] = {}
    experts: dict[str, ParameterSource] = {}
    trunk: list[str] = []
    made: set[str] = set()
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = _rename(key, transforms, model.base_model_prefix, state)
        if target not in state:
            if _without_numbers(target) not in shapes_of_names:
                trunk.append(key)
            continue
        source = sources.setdefault(target, _new_source(target, converters.get(pattern) if pattern else None))
        source.keys.setdefault(pattern or key, []).append(key)
        made.update(source.targets)
        feeding = [name in expert_parameters for name in source.targets]
        if all(feeding):
            experts.update(dict.fromkeys(source.targets, source))
        elif any(feeding):
            raise ArtifactError(f"{type(model).__name__}: {key} makes both experts and other parameters")
        else:
            trunk.append(key)
    _check_complete(model, set(state), made)
    return SourceMap(experts, trunk)


def _rename(key: str, transforms: list[Any], prefix: str, state: Mapping[str, torch.Tensor]) -> tuple[str, str | None]:
    """The parameter that a checkpoint's tensor feeds, and the converter's pattern where one matches."""
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    target, pattern = rename_source_key(key, renamings, converters, prefix, state)
    if target not in state and key in state:
        target, pattern = rename_source_key(key, [], [], prefix, state)
    return target, pattern


def _new_source(target: str, converter: Any | None) -> ParameterSource:
    if converter is None:
        return ParameterSource((target,), None)
    first = converter.target_patterns[0]
    return ParameterSource(tuple(target.replace(first, name) for name in converter.target_patterns), converter)


def _check_complete(model: PreTrainedModel, wanted: set[str], made: set[str]) -> None:
    tied: dict[str, str] = model.all_tied_weights_keys
    shared = {name for pair in tied.items() if made & set(pair) for name in pair}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    absent = sorted(
        (name for name in wanted - made - shared if not any(pattern.search(name) for pattern in ignored)),
        key=dot_natural_key,
    )
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ArtifactError(f"no tensor for {type(model).__name__}'s {absent[0]}{more}")


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)
