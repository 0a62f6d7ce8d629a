"""What `prepare` will write, settled and checked before it writes anything."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from expertmesh.artifact.checkpoint import Checkpoint, open_checkpoint
from expertmesh.artifact.conversion import ParameterSource, SourceMap, map_sources
from expertmesh.artifact.experts import expert_key, expert_shapes
from expertmesh.artifact.manifest import FORMAT_VERSION, ExpertFunction
from expertmesh.artifact.modules import ExpertLayer, build_on_meta, find_expert_layers
from expertmesh.artifact.tensorfile import FLOAT_CODES, FLOAT_DTYPES, TensorEntry
from expertmesh.artifact.verify import derive_function, try_function
from expertmesh.errors import ArtifactError

TRUNK_SHARD_BYTES = 2 * 2**30
TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k")


@dataclass(frozen=True, eq=False)
class Plan:
    checkpoint: Checkpoint
    model: PreTrainedModel
    """On the meta device."""
    layers: list[ExpertLayer]
    sources: SourceMap
    function: ExpertFunction
    dtype: torch.dtype
    """Of the experts."""
    top_k: int
    shards: dict[str, list[str]]
    """The trunk's files and the names of their tensors."""

    @property
    def expert_shapes(self) -> dict[str, tuple[int, ...]]:
        return expert_shapes(*self.layers[0].sizes, self.function)

    def experts_layout(self, layer: ExpertLayer) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> dtype code and shape, in the order of the layer's file."""
        code, shapes = FLOAT_CODES[self.dtype], self.expert_shapes
        return {expert_key(e, name): (code, shape) for e in range(layer.num_experts) for name, shape in shapes.items()}

    @property
    def expert_bytes(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.expert_shapes.values()) * self.dtype.itemsize

    @property
    def trunk_bytes(self) -> int:
        return sum(self.checkpoint.tensors[name].size for name in self.sources.trunk)

    @property
    def total_bytes(self) -> int:
        return self.trunk_bytes + sum(layer.num_experts for layer in self.layers) * self.expert_bytes

    def description(self) -> dict[str, Any]:
        """What the manifest says but for digests."""
        hidden, inner = self.layers[0].sizes
        return {
            "format_version": FORMAT_VERSION,
            "name": self.checkpoint.directory.resolve().name,
            "architecture": type(self.model).__name__,
            "model_type": self.model.config.model_type,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "layers": {layer.index: layer.num_experts for layer in self.layers},
            "top_k": self.top_k,
            "dtype": str(self.dtype).removeprefix("torch."),
            "expert_function": self.function.model_dump(),
            "expert_bytes": self.expert_bytes,
        }

    def identity(self) -> str:
        """Digest of source and plan: an artifact begun under another can't be continued."""
        text = json.dumps([self.checkpoint.digest(), self.description(), self.shards], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_plan(directory: Path) -> Plan:
    """Reads a checkpoint's headers alone; raises ArtifactError where it can't become an artifact."""
    checkpoint = open_checkpoint(directory)
    model = build_on_meta(checkpoint)
    try:
        layers = find_expert_layers(model)
        names = {f"{layer.name}.{name}" for layer in layers for name in layer.parameter_names}
        sources = map_sources(model, checkpoint.tensors, names)
        for layer in layers:
            _check_sources(layer, sources, checkpoint, model)
        functions = {layer.index: derive_function(layer) for layer in layers}
        if len(set(functions.values())) > 1:
            raise ArtifactError(f"{layers[0].class_name}: experts compute other functions from layer to layer")
        try_function(layers[0], functions[layers[0].index])
    except ArtifactError as error:
        raise ArtifactError(f"{directory}: {error}") from None
    return Plan(
        checkpoint=checkpoint,
        model=model,
        layers=layers,
        sources=sources,
        function=functions[layers[0].index],
        dtype=_expert_dtype(checkpoint, sources),
        top_k=_top_k(checkpoint, model),
        shards=_shards(checkpoint.tensors, sources.trunk),
    )


def _check_sources(layer: ExpertLayer, sources: SourceMap, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Converts the layer on the meta device, so that a wrong shape shows before anything is written."""
    for name, shape in layer.shapes.items():
        source = sources.experts[f"{layer.name}.{name}"]
        if source.by_expert and (absent := source.missing_expert(layer.num_experts)):
            raise ArtifactError(f"layer {layer.index}: {absent}")
        made = _convert_on_meta(layer, source, checkpoint, model)
        found = made.get(f"{layer.name}.{name}")
        if found is None or tuple(found.shape) != shape:
            what = "nothing" if found is None else f"shape {list(found.shape)}"
            raise ArtifactError(f"layer {layer.index}: {name}: the checkpoint's tensors make {what}, not {list(shape)}")


def _convert_on_meta(
    layer: ExpertLayer, source: ParameterSource, checkpoint: Checkpoint, model: PreTrainedModel
) -> dict[str, torch.Tensor]:
    parts: dict[str, list[torch.Tensor]] = {}
    for pattern, keys in source.keys.items():
        for key in keys:
            entry = checkpoint.tensors[key]
            if entry.dtype not in FLOAT_DTYPES:
                raise ArtifactError(f"{entry.path}: {key}: experts of type {entry.dtype} are not supported yet")
            parts.setdefault(pattern, []).append(
                torch.empty(entry.shape, dtype=FLOAT_DTYPES[entry.dtype], device="meta")
            )
    try:
        return source.convert(parts, model)
    except (RuntimeError, ValueError, IndexError) as error:
        names = ", ".join(target.removeprefix(f"{layer.name}.") for target in source.targets)
        reason = str(error).splitlines()[0]
        raise ArtifactError(
            f"layer {layer.index}: {names}: the checkpoint's tensors don't fit together: {reason}"
        ) from None


def _expert_dtype(checkpoint: Checkpoint, sources: SourceMap) -> torch.dtype:
    keys = [key for source in sources.experts.values() for part in source.keys.values() for key in part]
    codes = sorted({checkpoint.tensors[key].dtype for key in keys})
    if len(codes) > 1:
        raise ArtifactError(f"{checkpoint.where}: experts of several types: {', '.join(codes)}")
    return FLOAT_DTYPES[codes[0]]


def _top_k(checkpoint: Checkpoint, model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    for name in TOP_K_NAMES:
        if isinstance(value := getattr(config, name, None), int):
            return value
    for module in model.modules():
        if isinstance(value := getattr(module, "top_k", None), int):
            return value
    raise ArtifactError(f"{checkpoint.where}: its config does not say how many experts a token has")


def _shards(tensors: dict[str, TensorEntry], names: list[str]) -> dict[str, list[str]]:
    """Names in order, cut where a file would pass TRUNK_SHARD_BYTES; one tensor may alone."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in names:
        if parts[-1] and size + tensors[name].size > TRUNK_SHARD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensors[name].size
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}
