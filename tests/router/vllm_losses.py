"""Run as a program: `vllm_losses.py ARTIFACT`. vLLM over replicas of which one is stopped and comes back.

Prints one JSON line per kind of scheduler: {"reference": ..., "without": ..., "after": ...}, each a list per prompt of
{"tokens": [...], "reason": finish reason}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LAYER, EXPERT = 2, 0
"""What the replica that is stopped holds; not all prompts need it."""
MAX_TOKENS = 24
WAIT_S = 0.5


def prompts() -> list[str]:
    checkpoint = Path(__file__).parents[2] / "examples" / "demo_model" / "checkpoint"
    kinds: dict[str, list[str]] = json.loads((checkpoint / "prompts.json").read_text())
    return [prompt for kind in kinds.values() for prompt in kind[:3]]


def generate(llm: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
    outputs = [request.outputs[0] for request in llm.generate(prompts(), sampling, use_tqdm=False)]
    return [{"tokens": list(output.token_ids), "reason": output.finish_reason} for output in outputs]


def load(artifact: Path, directory: str, scheduler: str) -> Any:
    from vllm import LLM

    from expertmesh.artifact.manifest import TRUNK_DIRECTORY
    from router_service.app import CPU_COMPILATION, EXECUTOR
    from router_service.connection import SETTINGS_KEY, RouterSettings

    settings = RouterSettings(directory=directory, wait_for_experts_s=WAIT_S)
    return LLM(
        str(artifact / TRUNK_DIRECTORY),
        dtype="float32",
        max_model_len=256,
        kv_cache_memory_bytes=2**26,
        seed=0,
        enforce_eager=True,
        compilation_config=CPU_COMPILATION,
        distributed_executor_backend=EXECUTOR,
        scheduler_cls=f"router_service.vllm_scheduler.{scheduler}",
        async_scheduling=scheduler == "SparingAsyncScheduler",
        additional_config={SETTINGS_KEY: settings.model_dump()},
    )


def run(artifact: Path, scheduler: str) -> dict[str, Any]:
    from mesh import running_directory

    from expert_service.replica import Replica
    from expertmesh.args import GroupArgs
    from expertmesh.artifact.manifest import read_manifest
    from expertmesh.experts import format_indices

    manifest = read_manifest(artifact)
    layers = sorted(manifest.layers)
    every = {layer: format_indices(set(range(manifest.layers[layer]))) for layer in layers}
    rest = every | {layers[LAYER]: format_indices(set(range(manifest.layers[layers[LAYER]])) - {EXPERT})}

    def replica(directory: str, group: str, experts: dict[int, str]) -> Replica:
        given = {"artifact": str(artifact), "group": group, "experts": experts, "directory": directory}
        return Replica(GroupArgs.model_validate(given), directory)

    def stop(one: Replica) -> None:
        one.drain(1.0)
        one.stop()

    with running_directory() as directory:
        most, few = replica(directory, "most", rest), replica(directory, "few", {layers[LAYER]: str(EXPERT)})
        llm = load(artifact, directory, scheduler)
        found = {"reference": generate(llm)}
        stop(few)
        found["without"] = generate(llm)
        few = replica(directory, "few", {layers[LAYER]: str(EXPERT)})
        found["after"] = generate(llm)
        llm.llm_engine.engine_core.shutdown()
        stop(few)
        stop(most)
    return found


if __name__ == "__main__":
    for name in ("SparingScheduler", "SparingAsyncScheduler"):
        print(json.dumps(run(Path(sys.argv[1]), name)), flush=True)
