"""From the start of a process to its first answer, part by part, with the demo model: a replica and a router.

Each round starts a new process. `replica` is `python -m expert_service` without its command line; `replica_with_ray`
the same with Ray Serve's modules loaded first, as a Serve replica has to; `router` the engine of `router_service.app`
without Ray. Files are in the page cache. Seconds, medians over the rounds:
interpreter (until main runs), libraries (imports of other projects), imports (ours), mapping (experts mapped and laid
out), serving (until the gRPC server listens), first_dispatch (until the caller has the first answer, with connecting);
of the router: imports (vLLM and ours), engine (until it takes requests), first_token.
`own_s` is the replica's part that is our code: imports, mapping, serving and first_dispatch.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import measure, wire
from benchmarks.echo import line_of
from examples.demo import CHECKPOINT
from expertmesh.artifact.manifest import Manifest, read_manifest
from expertmesh.artifact.prepare import prepare

OURS = ("imports", "mapping", "serving", "first_dispatch")
ROUNDS = 5

Parts = dict[str, float]


def run(cluster: str | None) -> dict[str, object]:
    """Needs no cluster."""
    with tempfile.TemporaryDirectory() as folder, wire.directory() as directory:
        artifact = Path(folder) / "artifact"
        prepare(CHECKPOINT, artifact)
        manifest = read_manifest(artifact)
        runs: dict[str, Callable[[], Parts]] = {
            "replica": lambda: _start_replica(artifact, manifest, directory, []),
            "replica_with_ray": lambda: _start_replica(artifact, manifest, directory, ["--ray"]),
            "router": lambda: _start_router(artifact, directory),
        }
        rounds = measure.alternate(runs, ROUNDS)
    parts = {
        name: {part: round(measure.median([one[part] for one in given]), 3) for part in given[0]}
        for name, given in rounds.items()
    }
    ready = [sum(one.values()) for one in rounds["replica"]]
    own = [sum(one[part] for part in OURS) for one in rounds["replica"]]
    return {
        "replica_s": round(measure.median(ready), 3),
        "own_s": round(measure.median(own), 3),
        **{f"{name}_parts_s": found for name, found in parts.items()},
        "model": manifest.name,
    }


def _start_replica(artifact: Path, manifest: Manifest, directory: str, more: list[str]) -> Parts:
    layer, hidden_size = min(manifest.layers), manifest.hidden_size
    hidden_states = torch.ones(1, hidden_size, dtype=manifest.torch_dtype)
    with _child("replica", artifact, directory, more) as process:
        parts: Parts = json.loads(line_of(process))
        began = time.time()
        with wire.dispatcher(directory, manifest.fingerprint, 1, "auto") as made:
            made.finish(made.start(layer, hidden_states, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]])))
            return parts | {"first_dispatch": time.time() - began}


def _start_router(artifact: Path, directory: str) -> Parts:
    with _child("replica", artifact, directory, []) as replica:
        line_of(replica)
        with _child("router", artifact, directory, []) as router:
            parts: Parts = json.loads(line_of(router))
            return parts


@contextlib.contextmanager
def _child(role: str, artifact: Path, directory: str, more: list[str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.starting", role, f"--artifact={artifact}", f"--directory={directory}"]
    began = time.time()
    with subprocess.Popen(
        [*command, f"--began={began}", *more],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
