"""Run as a program: greedy outputs of checkpoints by plain vLLM, then of their artifacts with 1, 2 and 4 groups.

`vllm_outputs.py FOLDER ...`, each with `checkpoint` and `artifact` inside, prints one JSON line per folder:
{"plain", groups, "halves", "compiled" or "threads": [per prompt: {"tokens": [...], "logprobs": [...]}]}. One process,
since vLLM takes long to start.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

PROMPTS = ["hello world", "a", "def f(x): return x + 1 # and some more text to make it longer than the others"]
GROUPS = (1, 2, 4)
COMPILED = ("mixtral", "qwen2_moe")
"""Families that also run with torch.compile: one without and one with shared experts."""


def generate(llm: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True, logprobs=0)
    outputs = [request.outputs[0] for request in llm.generate(PROMPTS, sampling, use_tqdm=False)]
    return [
        {
            "tokens": list(output.token_ids),
            "logprobs": [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)],
        }
        for output in outputs
    ]


def load(model: Path, **more: Any) -> Any:
    from vllm import LLM

    from router_service.app import CPU_COMPILATION

    return LLM(
        str(model),
        dtype="float32",
        max_model_len=256,
        kv_cache_memory_bytes=2**28,
        seed=0,
        compilation_config=CPU_COMPILATION,
        attention_backend="CPU_MLA",  # where AMX is there, vLLM takes AMX_MLA, which refuses float32
        **{"enforce_eager": True, **more},
    )


def unload(llm: Any) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()


def compare(checkpoint: Path, artifact: Path) -> dict[str, Any]:
    from mesh import running_directory, running_groups, running_processes

    from expertmesh.artifact.manifest import TRUNK_DIRECTORY
    from router_service.app import overlapping
    from router_service.connection import SETTINGS_KEY, RouterSettings

    llm = load(checkpoint)
    runs: dict[str, Any] = {"plain": generate(llm)}
    unload(llm)
    del llm
    with running_directory() as directory:
        settings = {"additional_config": {SETTINGS_KEY: RouterSettings(directory=directory).model_dump()}}
        remote = None
        for groups in GROUPS:
            with running_groups(artifact, directory, groups):
                remote = remote or load(artifact / TRUNK_DIRECTORY, **settings)
                runs[str(groups)] = generate(remote)
        with running_processes(artifact, directory, 2):
            compiled = {"enforce_eager": False}
            more = {"halves": overlapping(2)}
            if artifact.parent.name in COMPILED:
                more |= {"compiled": compiled, "compiled halves": compiled | overlapping(2)}
            for name, arguments in more.items():
                other = load(artifact / TRUNK_DIRECTORY, **settings, **arguments)
                with splits_counted() as splits:
                    runs[name] = generate(other)
                runs[f"{name}: splits"] = splits[0]
                unload(other)
            if artifact.parent.name in COMPILED:
                with attention_in_threads(2) as threaded:
                    other = load(artifact / TRUNK_DIRECTORY, **settings, **overlapping(2))
                    runs["threads"] = generate(other)
                    runs["threads: calls"] = threaded[0]
                    unload(other)
        experts_held = [name for name, tensor in named_parameters(remote) if ".experts." in name and tensor.numel()]
        runs["experts_in_trunk"] = experts_held
        unload(remote)
    return runs


@contextmanager
def splits_counted() -> Iterator[list[int]]:
    """How many steps run as two halves meanwhile."""
    from router_service import vllm_worker

    count, made = [0], vllm_worker.Turns

    def counted() -> Any:
        count[0] += 1
        return made()

    with mock.patch.object(vllm_worker, "Turns", counted):
        yield count


@contextmanager
def attention_in_threads(count: int) -> Iterator[list[int]]:
    """In every step, whatever its size; how many calls had so many threads meanwhile."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import _cached_get_attn_backend

    from router_service import vllm_attention

    calls, set_num_threads = [0], vllm_attention.set_num_threads

    def counted(threads: int) -> None:
        calls[0] += threads == count
        set_num_threads(threads)

    _cached_get_attn_backend.cache_clear()
    vllm_attention.use_threads(count)
    try:
        with (
            mock.patch.object(vllm_attention, "LEAST_TOKENS", 1),
            mock.patch.object(vllm_attention, "set_num_threads", counted),
        ):
            yield calls
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
        _cached_get_attn_backend.cache_clear()


def named_parameters(llm: Any) -> list[tuple[str, Any]]:
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    return list(model.named_parameters())


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        print(json.dumps(compare(folder / "checkpoint", folder / "artifact")), flush=True)
