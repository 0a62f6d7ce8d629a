"""How much each expert of each layer has to do: observed by the directory, or given as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy
import pydantic
import yaml

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import Section
from expertmesh.errors import ClusterError, ConfigError
from expertmesh.placement.arrays import Floats
from expertmesh.v1 import directory_pb2
from expertmesh.yaml_file import first_problem

MAX_LOADS_BYTES = 64 * 2**20
"""Co-activation of 61 layers with 256 experts, each with each of its layer, is about as much."""
MAX_NESTING = 16
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Rate = Annotated[float, pydantic.Field(ge=0, le=1e15, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(ge=0, le=1, allow_inf_nan=False)]
Index = Annotated[int, pydantic.Field(ge=0)]


class Loads(Section):
    fingerprint: str | None = pydantic.Field(None, description="Of the model; left out, it is not checked.")
    rows_per_s: dict[Index, tuple[Rate, ...]] = pydantic.Field(
        min_length=1, description="MoE layer -> rows per second of each of its experts, in their order."
    )
    coactivation: dict[Index, tuple[tuple[Index, Index, Share], ...]] = pydantic.Field(
        {}, description="MoE layer -> (expert, expert, share of the layer's tokens that choose both); others are 0."
    )

    @pydantic.model_validator(mode="after")
    def pairs_are_of_two(self) -> Loads:
        for layer, pairs in self.coactivation.items():
            same = next((one for one, other, _ in pairs if one == other), None)
            if same is not None:
                raise ValueError(f"coactivation.{layer}: expert {same} stands beside itself")
        return self

    def array(self, manifest: Manifest) -> Floats:
        """[L, E] in ascending order of layers; where a layer has fewer experts than others, NaN follows them."""
        loads = numpy.full((len(manifest.layers), max(manifest.layers.values())), numpy.nan)
        for row, (layer, count) in enumerate(sorted(manifest.layers.items())):
            loads[row, :count] = self.rows_per_s[layer]
        return loads


def uniform_loads(manifest: Manifest, tokens_per_s: float) -> Loads:
    """Every expert equally often: `top_k` rows per token and layer."""
    rates = {
        layer: (tokens_per_s * manifest.top_k / count,) * count for layer, count in sorted(manifest.layers.items())
    }
    return Loads(rows_per_s=rates)


def check_loads(loads: Loads, manifest: Manifest, where: str) -> None:
    """Raises ConfigError that begins with `where`: loads of another model, or none at all."""
    if loads.fingerprint is not None and loads.fingerprint != manifest.fingerprint:
        raise ConfigError(
            f"{where}: loads of the model with fingerprint {loads.fingerprint[:12]}, this one has "
            f"{manifest.fingerprint[:12]}"
        )
    for layer in sorted(loads.rows_per_s.keys() | loads.coactivation.keys()):
        if layer not in manifest.layers:
            raise ConfigError(f"{where}: layer {layer} has no routed experts in this model")
    for layer, count in sorted(manifest.layers.items()):
        rates = loads.rows_per_s.get(layer)
        if rates is None:
            raise ConfigError(f"{where}: rows_per_s: layer {layer} is missing")
        if len(rates) != count:
            raise ConfigError(f"{where}: rows_per_s.{layer}: {len(rates)} experts, this model has {count}")
        beyond = [max(pair[:2]) for pair in loads.coactivation.get(layer, ()) if max(pair[:2]) >= count]
        if beyond:
            raise ConfigError(f"{where}: coactivation.{layer}: this model has experts 0-{count - 1}, not {beyond[0]}")
    if not any(map(any, loads.rows_per_s.values())):
        raise ConfigError(f"{where}: no expert has any load")


def read_loads_file(path: Path) -> Loads:
    """Reads JSON or YAML; raises ConfigError with one line: the file, the key and what is wrong with it."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_LOADS_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    if len(text) > MAX_LOADS_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_LOADS_BYTES >> 20} MiB; not loads")
    content = _parse(path, text)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no keys; loads begin with `rows_per_s:`")
    try:
        return Loads.model_validate(content)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error)}") from None


def observed_loads(reply: directory_pb2.ExpertLoadReply, manifest: Manifest) -> Loads:
    """What the directory counted; experts that it does not name had nothing to do.

    Raises ClusterError where it has nothing to tell yet or names experts that the model does not have.
    """
    if not reply.window_s > 0 or not any(sum(layer.rows) for layer in reply.layers):
        raise ClusterError("directory: no expert has had a row yet; send some requests, or give --loads FILE")
    rates = {layer: [0.0] * count for layer, count in sorted(manifest.layers.items())}
    for layer in reply.layers:
        known = rates.get(layer.layer, [])
        for expert, rows in zip(layer.experts, layer.rows, strict=False):
            if expert >= len(known):
                raise ClusterError(f"directory: counts rows of layer {layer.layer}, expert {expert}, of another model")
            known[expert] += rows / reply.window_s
    return Loads(fingerprint=reply.fingerprint or None, rows_per_s={layer: tuple(one) for layer, one in rates.items()})


def loads_text(loads: Loads) -> str:
    """The loads as JSON; `read_loads_file` reads them back."""
    return json.dumps(loads.model_dump(mode="json", exclude_none=True)) + "\n"


def _parse(path: Path, text: bytes) -> Any:
    """JSON where it begins like JSON, for it is read a hundred times faster; YAML else."""
    try:
        if text.lstrip()[:1] == b"{":
            try:
                return json.loads(text)
            except json.JSONDecodeError:
                pass  # a flow mapping of YAML begins so too
        _check_nesting(path, text)
        return yaml.load(text, YAML_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: neither JSON nor YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: neither JSON nor YAML: {str(error).splitlines()[0]}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not text in UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None


def _check_nesting(path: Path, text: bytes) -> None:
    """Raises ConfigError before libyaml's composer, which recurses in C, meets what would overflow its stack."""
    depth = 0
    for event in yaml.parse(text, YAML_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path}: aliases do not belong in loads")
        if depth > MAX_NESTING:
            raise ConfigError(f"{path}: nested too deeply")


def pair_matrix(pairs: Mapping[int, tuple[tuple[int, int, float], ...]], layer: int, experts: int) -> Floats | None:
    """[E, E], symmetric: share of the layer's tokens that choose both; None where nothing is known of the layer."""
    known = pairs.get(layer)
    if not known:
        return None
    listed = numpy.array(known)
    one, other = listed[:, 0].astype(int), listed[:, 1].astype(int)
    matrix = numpy.zeros((experts, experts))
    matrix[one, other] = matrix[other, one] = listed[:, 2]
    return matrix
