"""Run as a program: `vllm_losses.py ARTIFACT`. vLLM over replicas of which one is stopped and comes back.

Prints one JSON line per kind of scheduler: {"reference": ..., "without": ..., "after": ...}, each a list per prompt of
{"tokens": [...], "reason": finish reason}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from divided import MAX_TOKENS, divided, engine_settings, prompts

from expertmesh.artifact.manifest import TRUNK_DIRECTORY
from router_service.connection import RouterSettings

WAIT_S = 0.5


def generate(llm: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
    outputs = [request.outputs[0] for request in llm.generate(prompts(), sampling, use_tqdm=False)]
    return [{"tokens": list(output.token_ids), "reason": output.finish_reason} for output in outputs]


def run(artifact: Path, scheduler: str) -> dict[str, Any]:
    from vllm import LLM

    with divided(artifact) as replicas:
        settings = RouterSettings(directory=replicas.directory, wait_for_experts_s=WAIT_S)
        llm = LLM(str(artifact / TRUNK_DIRECTORY), **engine_settings(settings, scheduler))
        found = {"reference": generate(llm)}
        replicas.lose()
        found["without"] = generate(llm)
        replicas.replace()
        found["after"] = generate(llm)
        llm.llm_engine.engine_core.shutdown()
    return found


if __name__ == "__main__":
    for name in ("SparingScheduler", "SparingAsyncScheduler"):
        print(json.dumps(run(Path(sys.argv[1]), name)), flush=True)
