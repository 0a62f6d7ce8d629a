"""The vLLM engine with remote experts against plain vLLM, family by family, in fp32, over gRPC."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import FAMILIES, make_checkpoint
from vllm_outputs import COMPILED

from expertmesh.artifact.prepare import prepare

PROGRAM = Path(__file__).with_name("vllm_outputs.py")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": str(Path(__file__).parent.parent),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Family -> what `vllm_outputs.py` printed."""
    folder = tmp_path_factory.mktemp("parity")
    for family in FAMILIES:
        prepare(make_checkpoint(family, folder / family / "checkpoint"), folder / family / "artifact")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *(str(folder / family) for family in FAMILIES)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(FAMILIES, map(json.loads, lines), strict=True))


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("family", "run"),
    [(family, run) for family in FAMILIES for run in (*"124", "halves")]
    + [(family, run) for family in COMPILED for run in ("compiled", "compiled halves", "threads")],
)
def test_greedy_tokens_and_logprobs_equal_plain_vllm(runs: dict[str, Any], family: str, run: str) -> None:
    for plain, remote in zip(runs[family]["plain"], runs[family][run], strict=True):
        assert len(plain["tokens"]) == 64
        assert remote["tokens"] == plain["tokens"]
        assert remote["logprobs"] == pytest.approx(plain["logprobs"], abs=1e-3)


@pytest.mark.vllm
@pytest.mark.parametrize("family", COMPILED)
def test_attention_of_every_layer_and_step_had_two_threads(runs: dict[str, Any], family: str) -> None:
    """Its metadata, and in each of two layers or more its KV cache and itself."""
    assert runs[family]["threads: calls"] >= 64 * (1 + 2 * 2)


@pytest.mark.vllm
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trunk_holds_no_expert(runs: dict[str, Any], family: str) -> None:
    assert runs[family]["experts_in_trunk"] == []


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("family", "run"),
    [(family, "halves") for family in FAMILIES] + [(family, "compiled halves") for family in COMPILED],
)
def test_every_step_of_several_tokens_was_split(runs: dict[str, Any], family: str, run: str) -> None:
    assert runs[family][f"{run}: splits"] >= 64
    assert runs[family].get("compiled: splits", 0) == 0
