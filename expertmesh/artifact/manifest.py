"""manifest.json: what an artifact holds, read by everything that serves it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import pydantic

from expertmesh.errors import ArtifactError

if TYPE_CHECKING:
    import torch

FORMAT_VERSION: Final = 1
MANIFEST_FILE = "manifest.json"
TRUNK_DIRECTORY = "trunk"
EXPERTS_DIRECTORY = "experts"
QUANT_METHOD = "expertmesh"
"""Name in the trunk's `quantization_config` under which vLLM and transformers find the plug-in."""

DTypeName = Literal["float32", "bfloat16", "float16"]


class ExpertFunction(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What one expert computes from a row x.

    gated: down(gate(W_gate x + b_gate) ⊙ (W_up x + b_up)) + b_down, where `gate` is `activation`, a name in
    transformers' ACT2FN; `swiglu_clamped` is gpt-oss' (up' + 1) ⊙ gate' · sigmoid(alpha · gate') with gate' at most
    `limit` and up' within ±limit. Not gated: down(activation(W_up x + b_up)) + b_down.
    """

    activation: str
    gated: bool = True
    bias: bool = False
    alpha: float | None = None
    limit: float | None = None


class Manifest(pydantic.BaseModel, frozen=True, extra="forbid"):
    format_version: Literal[1] = FORMAT_VERSION
    name: str
    """The source's directory name; the default name of the served model."""
    architecture: str
    """transformers' class, e.g. Qwen3MoeForCausalLM."""
    model_type: str
    hidden_size: int
    intermediate_size: int
    """Of one expert."""
    layers: dict[int, int]
    """MoE layers: decoder layer index -> number of routed experts."""
    top_k: int
    dtype: DTypeName
    expert_function: ExpertFunction
    fingerprint: str
    """Digest over the function, the shapes and the bytes of trunk and experts: equal only for the same model."""
    expert_bytes: int
    """Bytes of one expert's tensors, all of one layer and index."""

    @property
    def torch_dtype(self) -> torch.dtype:
        # imported here: configs, the command line and the directory read manifests and need no torch
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def read_manifest(artifact: Path) -> Manifest:
    """Reads and validates `artifact`/manifest.json; raises ArtifactError naming the file and what is wrong."""
    path = artifact / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"{artifact}: no artifact here ({MANIFEST_FILE} is missing); make one with `prepare`"
        ) from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(f"{path}: {'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}") from None


def experts_file(artifact: Path, layer: int) -> Path:
    """The safetensors file that holds a layer's experts.

    Per expert e, row-major and contiguous: `{e}.gate_up` [2I, H] (gate above up; [I, H] where not gated), `{e}.down`
    [H, I], and with biases `{e}.gate_up_bias` [2I], `{e}.down_bias` [H].
    """
    return artifact / EXPERTS_DIRECTORY / f"layer-{layer:05d}.safetensors"
