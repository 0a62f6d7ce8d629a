"""The simulator's service times, busy shares and waits against real replicas with an emulated device.

One group of the demo model (4 layers, 16 experts, top-2) with 1 and 2 replicas in this process, over gRPC on loopback,
under Poisson arrivals of messages of 16 rows that go to the replica with the fewest rows under way; rates are such that
the simulator predicts the busy share in the case's name, BUSYxREPLICAS. The emulated device takes 5 ms per batch and
more for what it holds, which two cores can follow.

`error_service`, `error_busy` and `error_wait_p95` are |simulated / real - 1|; `error_wait_p50` is the difference in
service times, since most rows of a case may wait not at all. `worst_*` are the largest over the cases.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch

from benchmarks.measure import percentile
from examples.demo import CHECKPOINT
from expert_service.executor import Executor, Pairs
from expert_service.replica import Replica
from expertmesh.args import GroupArgs
from expertmesh.artifact.manifest import Manifest, read_manifest
from expertmesh.artifact.prepare import prepare
from expertmesh.config import EmulatedDevice
from expertmesh.errors import ExpertMeshError
from expertmesh.experts import format_indices
from expertmesh.simulation.demand import Messages, demand
from expertmesh.simulation.layout import Layout, make_layout
from expertmesh.simulation.scenario import Scenario
from expertmesh.simulation.service import ServiceModel
from expertmesh.v1 import expert_pb2 as pb
from loadtest.dispatches import Model, random_rows, request_for
from loadtest.precise_loop import run_precisely
from loadtest.replica_link import ReplicaLink

BUSY = (0.3, 0.5, 0.7, 0.85)
REPLICAS = (1, 2)
ROWS = 16
MESSAGES, WARM_UP = 2000, 100
DEVICE = EmulatedDevice(teraflops=0.005, memory_gb_per_s=1.2, overhead_us=5000)
TIMEOUT_S = 60.0
Case = tuple[float, int]
"""The busy share that the simulator predicts, and replicas."""


@dataclass(frozen=True)
class Found:
    """Of one case, simulated or real; times are milliseconds."""

    service: float
    busy: float
    wait_p50: float
    wait_p95: float
    batch: float
    """Messages computed together."""


@dataclass
class Timed:
    """An executor that notes how long each batch took."""

    inner: Executor
    took_s: list[float] = field(default_factory=list)

    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        began = time.monotonic()
        output = self.inner.run(layer, hidden_states, pairs)
        self.took_s.append(time.monotonic() - began)
        return output


def run(cluster: str | None) -> dict[str, object]:
    """Needs no cluster."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "demo.artifact"
        prepare(CHECKPOINT, artifact)
        manifest = read_manifest(artifact)
        simulators = {count: Simulator(manifest, count) for count in REPLICAS}
        rates = {(busy, count): simulators[count].rate_for(busy) for count in REPLICAS for busy in BUSY}
        real = run_precisely(_measure(artifact, manifest, rates))
    figures: dict[str, dict[str, float]] = {}
    for (busy, count), rate in rates.items():
        _note(figures, f"{busy:g}x{count}", simulators[count].found(rate), real[busy, count])
    worst = {f"worst_{name}": max(cases.values()) for name, cases in figures.items() if name.startswith("error_")}
    return {**worst, **figures, "messages_per_case": MESSAGES}


def _note(figures: dict[str, dict[str, float]], case: str, simulated: Found, real: Found) -> None:
    found = {
        "error_service": abs(simulated.service / real.service - 1),
        "error_busy": abs(simulated.busy / real.busy - 1),
        "error_wait_p50": abs(simulated.wait_p50 - real.wait_p50) / real.service,
        "error_wait_p95": abs(simulated.wait_p95 / real.wait_p95 - 1),
    }
    for name in ("service", "busy", "wait_p50", "wait_p95", "batch"):
        unit = "" if name in {"busy", "batch"} else "_ms"
        found |= {f"simulated_{name}{unit}": getattr(simulated, name), f"real_{name}{unit}": getattr(real, name)}
    for name, figure in found.items():
        figures.setdefault(name, {})[case] = round(figure, 4)


class Simulator:
    """The simulator's model of one group with all experts and `replicas` replicas, each message to one of them."""

    def __init__(self, manifest: Manifest, replicas: int) -> None:
        described = {
            "model": {
                "layers": len(manifest.layers),
                "experts": max(manifest.layers.values()),
                "top_k": manifest.top_k,
                "hidden_size": manifest.hidden_size,
                "intermediate_size": manifest.intermediate_size,
            },
            "device": DEVICE.model_dump(),
            "division": {"layers_per_group": len(manifest.layers), "experts_per_group": max(manifest.layers.values())},
            "traffic": {"peak_tokens_per_s": 1, "tokens_per_step": ROWS},
        }
        scenario = Scenario.model_validate(described)
        self._layout: Layout = make_layout(scenario)
        self._model = ServiceModel(self._layout, scenario.model.cost)
        self._replicas = numpy.array([float(replicas)])
        self._chance = manifest.top_k / max(manifest.layers.values())

    def found(self, rate: float) -> Found:
        chances = numpy.full(len(self._layout.pairs), self._chance)
        # a step's rows pass all layers, a message is of one
        asked = demand(self._layout, rate * ROWS / len(self._layout.groups[0].held), chances, ROWS)
        sent = Messages(asked.dispatches_per_s, asked.rows, asked.pairs, numpy.log1p(-asked.touch))
        loads = self._model.loads(sent, self._replicas, numpy.zeros(1), 1.0, None)
        waits_s = numpy.linspace(0, 40 * float(loads.service_s[0]), 40_001)
        later = loads.later_than(waits_s[None, :])[0]
        p50, p95 = (float(waits_s[numpy.argmax(later <= 1 - share)]) * 1e3 for share in (0.5, 0.95))
        return Found(float(loads.service_s[0]) * 1e3, float(loads.busy[0]), p50, p95, float(loads.batch[0]))

    def rate_for(self, busy: float) -> float:
        """Messages/s at which the model predicts this busy share; by bisection."""
        low, high = 0.0, 1e5
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.found(middle).busy < busy else (low, middle)
        return high


@contextmanager
def _replicas(artifact: Path, manifest: Manifest, count: int) -> Iterator[list[Replica]]:
    experts = {layer: format_indices(set(range(held))) for layer, held in manifest.layers.items()}
    args = GroupArgs(artifact=str(artifact), group="all", experts=experts, emulated=DEVICE)
    replicas = [Replica(args, None) for _ in range(count)]
    try:
        yield replicas
    finally:
        for replica in replicas:
            replica.stop()


async def _measure(artifact: Path, manifest: Manifest, rates: dict[Case, float]) -> dict[Case, Found]:
    """All on one event loop, since gRPC's own parts outlive a loop."""
    found = {}
    for replicas in REPLICAS:
        with _replicas(artifact, manifest, replicas) as running:
            for case, rate in rates.items():
                if case[1] == replicas:
                    found[case] = await _drive(running, manifest, rate)
    return found


async def _drive(replicas: Sequence[Replica], manifest: Manifest, rate: float) -> Found:
    """Sends messages at Poisson times, whether or not the ones before are answered."""
    links = [ReplicaLink(replica.entry()) for replica in replicas]
    await asyncio.gather(*(link.tried() for link in links))
    generator, numbers = random.Random(int(rate)), numpy.random.default_rng(int(rate))
    model = Model(
        manifest.hidden_size,
        links[0].description.dtype,
        dict(manifest.layers),
        random_rows(manifest.hidden_size, links[0].description.dtype, 1),
    )
    layers = sorted(manifest.layers)
    timed = [Timed(replica.endpoint.executor) for replica in replicas]
    waiting: list[asyncio.Future[pb.DispatchResponse]] = []
    # Poisson arrivals, given how many come: the rate is exact
    count = WARM_UP + MESSAGES
    due_s = sorted(generator.uniform(0, count / rate) for _ in range(count))
    first = began = time.monotonic()
    for number, after_s in enumerate(due_s):
        if number == WARM_UP:
            for replica, executor in zip(replicas, timed, strict=True):
                replica.endpoint.executor = executor
            began = time.monotonic()
        await asyncio.sleep(max(0.0, first + after_s - time.monotonic()))
        least = min(link.rows_under_way for link in links)
        link = generator.choice([one for one in links if one.rows_under_way == least])
        layer = generator.choice(layers)
        waiting.append(link.send(request_for(model, layer, _pairs(manifest, layer, numbers), TIMEOUT_S)))
    elapsed_s = time.monotonic() - began
    took_s = [one for executor in timed for one in executor.took_s]
    answers = (await asyncio.gather(*waiting))[WARM_UP:]
    for replica, executor in zip(replicas, timed, strict=True):
        replica.endpoint.executor = executor.inner
    await asyncio.gather(*(link.close() for link in links))
    if any(answer.status.code != pb.CODE_OK for answer in answers):
        raise ExpertMeshError("simulation_error: a replica refused a message")
    waits_ms = [answer.timings.queue_us / 1e3 for answer in answers]
    return Found(
        service=1e3 * sum(took_s) / len(took_s),
        busy=sum(took_s) / elapsed_s / len(replicas),
        wait_p50=percentile(waits_ms, 0.5),
        wait_p95=percentile(waits_ms, 0.95),
        batch=MESSAGES / len(took_s),
    )


def _pairs(manifest: Manifest, layer: int, numbers: numpy.random.Generator) -> numpy.typing.NDArray[numpy.int32]:
    """[2, P]: each row with `top_k` different experts, all experts alike."""
    order = numbers.random((ROWS, manifest.layers[layer])).argsort(axis=1)[:, : manifest.top_k]
    rows = numpy.repeat(numpy.arange(ROWS), manifest.top_k)
    return numpy.stack([rows, order.ravel()]).astype(numpy.int32)
