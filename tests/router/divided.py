"""The demo model's experts over two replicas, of which the one with a single expert can go and come back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mesh import running_directory

from expert_service.replica import Replica
from expertmesh.args import GroupArgs
from expertmesh.artifact.manifest import read_manifest
from expertmesh.experts import format_indices
from router_service.app import CPU_COMPILATION, EXECUTOR
from router_service.connection import SETTINGS_KEY, RouterSettings

CHECKPOINT = Path(__file__).parents[2] / "examples" / "demo_model" / "checkpoint"
LAYER, EXPERT = 2, 2
"""What the small replica holds; not all prompts need it, but the rows with which vLLM warms up do."""
MAX_TOKENS = 24


class Divided:
    """`directory` is the address at which both replicas announce themselves."""

    def __init__(self, artifact: Path, directory: str) -> None:
        self.artifact, self.directory = artifact, directory
        held = read_manifest(artifact).layers
        layer = sorted(held)[LAYER]
        rest = {
            one: format_indices(set(range(count)) - ({EXPERT} if one == layer else set()))
            for one, count in held.items()
        }
        self.few_experts = {layer: str(EXPERT)}
        self.most, self.few = self._replica("most", rest), self._replica("few", self.few_experts)

    def lose(self) -> None:
        _stop(self.few)

    def replace(self) -> None:
        self.few = self._replica("few", self.few_experts)

    def _replica(self, group: str, experts: dict[int, str]) -> Replica:
        given = {"artifact": str(self.artifact), "group": group, "experts": experts, "directory": self.directory}
        return Replica(GroupArgs.model_validate(given), self.directory)


@contextmanager
def divided(artifact: Path) -> Iterator[Divided]:
    """Both replicas run, and at the end must again."""
    with running_directory() as directory:
        replicas = Divided(artifact, directory)
        yield replicas
        _stop(replicas.few)
        _stop(replicas.most)


def prompts() -> list[str]:
    kinds: dict[str, list[str]] = json.loads((CHECKPOINT / "prompts.json").read_text())
    return [prompt for kind in kinds.values() for prompt in kind[:3]]


def engine_settings(settings: RouterSettings, scheduler: str) -> dict[str, Any]:
    """Of vLLM's engine; `scheduler` is a class of router_service.vllm_scheduler."""
    return {
        "dtype": "float32",
        "max_model_len": 256,
        "block_size": 32,
        "kv_cache_memory_bytes": 2**26,
        "seed": 0,
        "enforce_eager": True,
        "compilation_config": CPU_COMPILATION,
        "distributed_executor_backend": EXECUTOR,
        "scheduler_cls": f"router_service.vllm_scheduler.{scheduler}",
        "async_scheduling": scheduler == "SparingAsyncScheduler",
        "additional_config": {SETTINGS_KEY: settings.model_dump()},
    }


def _stop(replica: Replica) -> None:
    replica.drain(1.0)
    replica.stop()
