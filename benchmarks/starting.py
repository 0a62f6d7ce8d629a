"""A process that says how long its start took, part by part. Used by `startup`; imports nothing before it is timed."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

LIBRARIES = (
    "numpy",
    "torch",
    "google.protobuf",
    "grpc.aio",
    "grpc_health.v1.health",
    "safetensors",
    "yaml",
    "pydantic",
)
"""Of a replica; what only some of them import comes with those."""
RAY_LIBRARIES = ("ray", "ray.serve")


class Clock:
    """Seconds since the last mark, by the wall, so that processes can share it."""

    def __init__(self, began: float) -> None:
        self._last = began
        self.parts: dict[str, float] = {}

    def mark(self, name: str) -> None:
        now = time.time()
        self.parts[name] = now - self._last
        self._last = now


def _replica(given: argparse.Namespace) -> None:
    clock = Clock(given.began)
    clock.mark("interpreter")
    for library in (RAY_LIBRARIES if given.ray else ()) + LIBRARIES:
        importlib.import_module(library)
    clock.mark("libraries")
    import torch

    from expert_service.choice import build_executor
    from expert_service.replica import Replica
    from expert_service.weights import hold_experts
    from expertmesh.args import GroupArgs
    from expertmesh.artifact.manifest import read_manifest
    from expertmesh.experts import format_indices

    clock.mark("imports")
    manifest = read_manifest(given.artifact)
    experts = {layer: frozenset(range(count)) for layer, count in manifest.layers.items()}
    executor = build_executor(hold_experts(given.artifact, manifest, experts), torch.device("cpu"))
    clock.mark("mapping")
    texts = {layer: format_indices(held) for layer, held in experts.items()}
    args = GroupArgs(artifact=str(given.artifact), group="startup", experts=texts)
    replica = Replica(args, given.directory, executor=executor)
    clock.mark("serving")
    print(json.dumps(clock.parts), flush=True)
    sys.stdin.read()
    replica.drain(1.0)
    replica.stop()


def _router(given: argparse.Namespace) -> None:
    clock = Clock(given.began)
    clock.mark("interpreter")
    from vllm import LLM, SamplingParams

    from expertmesh.args import RouterArgs
    from expertmesh.artifact.manifest import TRUNK_DIRECTORY
    from router_service.app import engine_arguments

    clock.mark("imports")
    args = RouterArgs(artifact=str(given.artifact), name="startup", directory=given.directory)
    llm = LLM(str(given.artifact / TRUNK_DIRECTORY), **engine_arguments(args))
    clock.mark("engine")
    llm.generate(["1 + 1 ="], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    clock.mark("first_token")
    print(json.dumps(clock.parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.starting", description=__doc__)
    parser.add_argument("role", choices=("replica", "router"))
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--began", type=float, required=True, help="when the process was started, seconds since 1970")
    parser.add_argument("--ray", action="store_true", help="load Ray Serve's modules first")
    given = parser.parse_args()
    (_replica if given.role == "replica" else _router)(given)


if __name__ == "__main__":
    main()
