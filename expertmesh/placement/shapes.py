"""Shapes of models, for plans without an artifact: published ones by name, others by their numbers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pydantic
import yaml

from expertmesh.artifact.manifest import ExpertFunction, Manifest
from expertmesh.config import Section
from expertmesh.errors import ConfigError
from expertmesh.yaml_file import first_problem

SHAPES_FILE = Path(__file__).with_name("shapes.yaml")
Count = pydantic.PositiveInt


class Attention(Section):
    """Grouped-query attention."""

    heads: Count
    kv_heads: Count
    head_size: Count

    def parameters(self, hidden: int) -> int:
        return 2 * hidden * self.head_size * (self.heads + self.kv_heads)


class LatentAttention(Section):
    """Multi-head latent attention, with a low-rank query too."""

    heads: Count
    q_rank: Count
    kv_rank: Count
    nope_size: Count
    rope_size: Count
    v_size: Count

    def parameters(self, hidden: int) -> int:
        query = self.q_rank * (hidden + self.heads * (self.nope_size + self.rope_size))
        key_value = hidden * (self.kv_rank + self.rope_size)
        key_value += self.kv_rank * self.heads * (self.nope_size + self.v_size)
        return query + key_value + hidden * self.heads * self.v_size


class TrunkShape(Section):
    bytes_per_weight: float = pydantic.Field(gt=0, description="But of embedding and LM head, which are bfloat16.")
    vocabulary: Count = pydantic.Field(description="Embedding and LM head are two matrices.")
    attention: Attention | None = None
    latent_attention: LatentAttention | None = None
    shared_intermediate: int = pydantic.Field(0, ge=0, description="Of a layer's shared experts together.")
    dense_layers: int = pydantic.Field(0, ge=0, description="Layers without routed experts, before the others.")
    dense_intermediate: int = pydantic.Field(0, ge=0)


class Shape(Section):
    source: str = ""
    layers: Count = pydantic.Field(le=1000, description="With routed experts.")
    experts: Count = pydantic.Field(le=65536, description="Per layer.")
    top_k: Count
    hidden: Count
    intermediate: Count = pydantic.Field(description="Of one expert.")
    bytes_per_weight: float = pydantic.Field(2, gt=0, le=8, description="Of the experts.")
    trunk: TrunkShape | None = None

    @pydantic.model_validator(mode="after")
    def chooses_some(self) -> Shape:
        if self.top_k > self.experts:
            raise ValueError(f"top_k: {self.top_k} of {self.experts} experts")
        return self

    def manifest(self, name: str) -> Manifest:
        """Of a model with gated experts; its fingerprint is no artifact's, so no cluster takes its plans."""
        first = self.trunk.dense_layers if self.trunk else 0
        weights = 3 * self.hidden * self.intermediate
        return Manifest(
            name=name,
            architecture="",
            model_type="",
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            layers=dict.fromkeys(range(first, first + self.layers), self.experts),
            top_k=self.top_k,
            dtype="bfloat16",
            expert_function=ExpertFunction(activation="silu"),
            fingerprint=f"shape:{name}",
            expert_bytes=round(weights * self.bytes_per_weight),
        )


def shape_of(text: str) -> tuple[str, Shape]:
    """The name and shape that `text` means: a published model's name, or layers=32,experts=8,top_k=2,hidden=4096,
    intermediate=14336,bytes_per_weight=2. Raises ConfigError naming what is wrong."""
    known = published()
    if "=" not in text:
        if text not in known:
            raise ConfigError(
                f"--shape: no model {text!r}; known are {', '.join(known)}; or give its numbers, "
                "layers=32,experts=8,top_k=2,hidden=4096,intermediate=14336"
            )
        return text, known[text]
    numbers = dict(part.strip().partition("=")[::2] for part in text.split(","))
    try:
        return "shape", Shape.model_validate(numbers)
    except pydantic.ValidationError as error:
        raise ConfigError(f"--shape: {first_problem(error)}") from None


@cache
def published() -> dict[str, Shape]:
    return {name: Shape.model_validate(shape) for name, shape in yaml.safe_load(SHAPES_FILE.read_text()).items()}
