"""A router's process without a model: runs layers when it is told to. Used by `scale`.

Reads lines of JSON, `{"replicas": N, "layers": M}`, from its standard input and answers each with one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks import measure, wire
from router_service.dispatch.scatter import ReplicaBatch
from router_service.dispatcher import Dispatcher
from router_service.transport.base import Answer, DirectTransport, Pending, Transport

ROWS = 16


class Recorder:
    """A transport between the dispatcher and the real one that keeps what answers say of their time."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.answers: list[Answer] = []

    def start(self, layer: int, hidden_states: torch.Tensor, batches: Sequence[ReplicaBatch]) -> Pending:
        self.pending = self.inner.start(layer, hidden_states, batches)
        return self

    def late_after_s(self) -> float:
        return self.pending.late_after_s()

    def wait(self, patience_s: float) -> list[Answer | None]:
        answers = self.pending.wait(patience_s)
        self.answers = [answer for answer in answers if answer is not None]
        self.waited = time.perf_counter()
        return answers


def run_layers(made: Dispatcher, replicas: int, layers: int) -> dict[str, float]:
    """CPU time of this process and round trip, microseconds per layer."""
    routed = wire.routed(ROWS)
    cpu = time.process_time()
    seconds = measure.timed(lambda: wire.step(made, replicas, routed), layers)
    cpu = time.process_time() - cpu
    return {
        "cpu_us": 1e6 * cpu / layers,
        "p50_us": 1e6 * measure.percentile(seconds, 0.5),
        "p99_us": 1e6 * measure.percentile(seconds, 0.99),
        "layers_per_s": layers / sum(seconds),
    }


def split(made: Dispatcher, replicas: int, layers: int) -> dict[str, float]:
    """Where a layer's time goes, microseconds: packing, the replica's queue and computation, combining; the wire and
    all waiting for cores is what is left of the round trip. Of replicas that answer side by side the slowest counts
    on the Python transport, their mean on the native one."""
    routed = wire.routed(ROWS)
    if isinstance(made.transport, DirectTransport):
        return _native_split(made, replicas, layers, routed)
    recorder = Recorder(made.transport)
    watched = Dispatcher(made.replicas, recorder)
    found = []
    for _ in range(layers):
        began = time.perf_counter()
        dispatch = watched.start(wire.layer_of(replicas), *routed)
        packed = time.perf_counter()
        watched.finish(dispatch)
        ended = time.perf_counter()
        timings = [answer.timing for answer in recorder.answers if answer.timing is not None]
        slowest = max(timings, key=lambda timing: timing.round_trip_us)
        spent = {
            "pack": 1e6 * (packed - began),
            "queue": float(slowest.queue_us),
            "compute": float(slowest.compute_us),
            "combine": 1e6 * (ended - recorder.waited),
        }
        found.append(spent | {"wire": 1e6 * (ended - began) - sum(spent.values())})
    return {name: measure.median([one[name] for one in found]) for name in found[0]}


def _native_split(
    made: Dispatcher, replicas: int, layers: int, routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> dict[str, float]:
    layer = wire.layer_of(replicas)
    before = made.transport.timings()[layer]  # type: ignore[attr-defined]
    began = time.perf_counter()
    for _ in range(layers):
        wire.step(made, replicas, routed)
    total = 1e6 * (time.perf_counter() - began) / layers
    after = made.transport.timings()[layer]  # type: ignore[attr-defined]
    steps, messages = after.steps - before.steps, after.messages - before.messages
    spent = {
        "pack": (after.scatter_us - before.scatter_us) / steps,
        "queue": (after.queue_us - before.queue_us) / messages,
        "compute": (after.compute_us - before.compute_us) / messages,
        "combine": (after.combine_us - before.combine_us) / steps,
    }
    return spent | {"wire": total - sum(spent.values())}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router", description=__doc__)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--fingerprint", required=True)
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--transport", required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with wire.dispatcher(given.directory, given.fingerprint, given.replicas, given.transport) as made:
        print("ready", flush=True)
        for line in sys.stdin:
            task = json.loads(line)
            done = (split if task.get("split") else run_layers)(made, task["replicas"], task["layers"])
            print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
