"""Rows per second of a replica's expert computation on one thread, beside what else computes experts on a CPU.

A case is HIDDENxINTERMEDIATE/PAIRS: that many rows with one expert each, spread evenly over 8 experts, or all on one
of them (`all_on_one_expert`). Every contender has as many layers of random bf16 weights as fill `ROTATED_BYTES`, and
each call takes the next layer, so that no call finds its weights in a core's own cache: a model's layers do not either.
Where memory lies makes a difference of some per cent, so the executor and vLLM hold every layer twice, made before and
after the other's. Bandwidth is that of one thread which reads on through `READ_BYTES`, a turn of it in every round of
every case; a case's bytes are those of the weights that it touches.

`ragged_speedup_over_one_table`: a batch of a group that has 8 of 16 experts, top-2, so that its rows have one pair or
two; beside the same executor with one table in which each row has two, the missing ones with weight 0. Key: tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers.integrations.moe import grouped_mm_experts_forward

from benchmarks.measure import alternate, median, median_ratio
from expert_service.choice import build_executor
from expert_service.executor import Executor, Pairs
from expert_service.weights import HeldExperts, hold_experts
from expertmesh.artifact.experts import expert_key
from expertmesh.artifact.manifest import EXPERTS_DIRECTORY, ExpertFunction, Manifest, experts_file

SHAPES = ((512, 1024), (2048, 1408))
PAIRS = (1, 8, 64, 256, 1024)
TOKENS = (16, 64, 512)
"""Of which the ragged batches are made."""
EXPERTS = 8
ROTATED_BYTES = 512 * 2**20
READ_BYTES = 2**30
READ_PER_TURN = 2**27
ROUNDS = 11
SECONDS_PER_TURN = 0.06
SMALL = 32
"""Sizes of experts that cost nothing but the call."""
OURS, VLLM = "expertmesh", "vllm"


@dataclass(frozen=True, eq=False)
class Layers:
    """Weights of L layers: gate_up [L, E, 2I, H] and down [L, E, H, I]."""

    gate_up: torch.Tensor
    down: torch.Tensor

    @property
    def bytes_per_expert(self) -> int:
        return self.gate_up[0, 0].nbytes + self.down[0, 0].nbytes


@dataclass(frozen=True, eq=False)
class Batch:
    """R rows with K experts each."""

    x: torch.Tensor
    """[R, H]"""
    experts: torch.Tensor
    """[R, K] int32"""
    weights: torch.Tensor
    """[R, K] fp32; 0 where a row has fewer."""

    pairs: Pairs
    """The same for the replica's executor, which is asked for those with a weight alone."""

    @property
    def filled(self) -> Pairs:
        """All R * K pairs."""
        rows, width = self.experts.shape
        which = numpy.repeat(numpy.arange(rows, dtype=numpy.int32), width)
        return Pairs(which, self.experts.flatten().numpy(), self.weights.flatten().numpy())


Compute = Callable[[int, Batch], torch.Tensor]
"""Layer and batch -> [R, H]."""


def run(cluster: str | None) -> dict[str, object]:
    """Needs no cluster: all of it runs in this process."""
    torch.set_num_threads(1)
    spread: dict[str, Case] = {}
    single: dict[str, Case] = {}
    ragged: dict[str, Case] = {}
    for hidden, inner in SHAPES:
        layers = make_layers(hidden, inner)
        contenders = make_contenders(layers)
        check(contenders, "loop", make_batch(hidden, 64, EXPERTS))
        for count in PAIRS:
            name = f"{hidden}x{inner}/{count}"
            spread[name] = measure(contenders, layers, make_batch(hidden, count, EXPERTS))
            single[name] = measure(contenders, layers, make_batch(hidden, count, 1))
        for tokens in TOKENS:
            batch = make_ragged(hidden, tokens)
            check({name: contenders[name] for name in (OURS, VLLM)}, VLLM, batch)
            ragged[f"{hidden}x{inner}/{tokens}"] = measure(beside_one_table(contenders[OURS], batch), layers, batch)
    return {
        "ratio_to_best_peer": {name: round(case.ratio_to_best_peer, 3) for name, case in spread.items()},
        "fraction_of_memory_bandwidth": {name: round(case.fraction_of_bandwidth, 3) for name, case in spread.items()},
        "rows_per_s": {name: case.rows_per_s for name, case in spread.items()},
        "best_peer": {name: case.best_peer for name, case in spread.items()},
        "all_on_one_expert_ratio_to_best_peer": {
            name: round(case.ratio_to_best_peer, 3) for name, case in single.items()
        },
        "all_on_one_expert_rows_per_s": {name: case.rows_per_s for name, case in single.items()},
        "ragged_speedup_over_one_table": {name: round(case.ratio_to_best_peer, 3) for name, case in ragged.items()},
        "read_gb_per_s": round(median([1e-9 / median(case.seconds_per_byte) for case in spread.values()]), 2),
        "call_overhead_us": {str(rows): round(call_overhead_us(rows), 1) for rows in (1, 4, 64)},
        "rotated_mib": ROTATED_BYTES // 2**20,
    }


@dataclass(frozen=True)
class Case:
    """What was measured of one batch, per round."""

    rows: int
    touched_bytes: int
    seconds: dict[str, list[float]]
    """Contender -> seconds per call."""
    seconds_per_byte: list[float]
    """Of a plain read."""

    @property
    def best_peer(self) -> str:
        return min((name for name in self.seconds if name != OURS), key=lambda name: median(self.seconds[name]))

    @property
    def ratio_to_best_peer(self) -> float:
        """Our rows per second over those of the fastest peer."""
        return median_ratio(self.seconds[self.best_peer], self.seconds[OURS])

    @property
    def fraction_of_bandwidth(self) -> float:
        return median_ratio([each * self.touched_bytes for each in self.seconds_per_byte], self.seconds[OURS])

    @property
    def rows_per_s(self) -> dict[str, int]:
        return {name: round(self.rows / median(each)) for name, each in self.seconds.items()}


class Reader:
    """Reads on through a large block, round and round."""

    def __init__(self) -> None:
        self._block = torch.ones(READ_BYTES // READ_PER_TURN, READ_PER_TURN // 8, dtype=torch.int64)
        self._next = 0

    def turn(self) -> float:
        """Seconds per byte."""
        part = self._block[self._next]
        self._next = (self._next + 1) % len(self._block)
        return seconds(part.sum) / part.nbytes


def make_layers(hidden: int, inner: int) -> Layers:
    count = -(-ROTATED_BYTES // (EXPERTS * 3 * hidden * inner * 2))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5, generator=generator)

    return Layers(random(count, EXPERTS, 2 * inner, hidden), random(count, EXPERTS, hidden, inner))


def make_batch(hidden: int, count: int, experts: int) -> Batch:
    generator = torch.Generator().manual_seed(count)
    chosen = (torch.arange(count) % experts).to(torch.int32)[:, None]
    rows = torch.randn(count, hidden, generator=generator).to(torch.bfloat16)
    weights = torch.rand(count, 1, generator=generator)
    pairs = Pairs(numpy.arange(count, dtype=numpy.int32), chosen[:, 0].numpy(), weights[:, 0].numpy())
    return Batch(rows, chosen, weights, pairs)


def make_ragged(hidden: int, tokens: int) -> Batch:
    """What a group with the first 8 of 16 experts gets of so many tokens; each has two experts, drawn evenly."""
    generator = torch.Generator().manual_seed(tokens)
    drawn = torch.rand(tokens, 2 * EXPERTS, generator=generator).topk(2).indices
    held = drawn[(drawn < EXPERTS).any(dim=1)].sort(dim=1).values
    present = held < EXPERTS
    rows = torch.randn(len(held), hidden, generator=generator).to(torch.bfloat16)
    weights = torch.where(present, torch.rand(held.shape, generator=generator) + 0.1, 0)
    experts = torch.where(present, held, held[:, :1]).to(torch.int32)
    which = present.nonzero()[:, 0].to(torch.int32)
    pairs = Pairs(which.numpy(), experts[present].numpy(), weights[present].numpy())
    return Batch(rows, experts, weights, pairs)


def make_contenders(layers: Layers) -> dict[str, Compute]:
    """The replica's executor, which loads its weights from an artifact, and its peers; layers 0 to 2L - 1."""
    count = len(layers.down)
    first = load_executor(layers)
    vllm_halves = vllm(layers), vllm(layers)
    later = load_executor(layers)

    def ours(layer: int, batch: Batch) -> torch.Tensor:
        return (first if layer < count else later).run(layer % count, batch.x, batch.pairs)

    return {
        OURS: ours,
        VLLM: lambda layer, batch: vllm_halves[layer // count](layer % count, batch),
        "transformers_grouped_mm": transformers_grouped_mm(layers),
        "loop": partial(loop, layers),
    }


def beside_one_table(ours: Compute, batch: Batch) -> dict[str, Compute]:
    filled = replace(batch, pairs=batch.filled)
    return {OURS: ours, "one_table": lambda layer, _: ours(layer, filled)}


def load_executor(layers: Layers) -> Executor:
    with TemporaryDirectory() as work:
        return build_executor(write_experts(layers, Path(work)), torch.device("cpu"))


def write_experts(layers: Layers, work: Path) -> HeldExperts:
    """As an artifact of its own."""
    manifest = Manifest(
        name="random", architecture="none", model_type="none", hidden_size=layers.down.shape[2],
        intermediate_size=layers.down.shape[3], layers=dict.fromkeys(range(len(layers.down)), EXPERTS), top_k=1,
        dtype="bfloat16", expert_function=ExpertFunction(activation="silu"), fingerprint="0" * 16,
        expert_bytes=layers.bytes_per_expert,
    )  # fmt: skip
    (work / EXPERTS_DIRECTORY).mkdir()
    for layer in manifest.layers:
        tensors = {}
        for expert in range(EXPERTS):
            tensors[expert_key(expert, "gate_up")] = layers.gate_up[layer, expert]
            tensors[expert_key(expert, "down")] = layers.down[layer, expert]
        save_file(tensors, experts_file(work, layer))
    return hold_experts(work, manifest, dict.fromkeys(manifest.layers, frozenset(range(EXPERTS))))


def vllm(layers: Layers) -> Compute:
    # imported here: it takes seconds, and `--help` needs none of it
    from benchmarks.vllm_experts import call_layer, make_layers

    made = make_layers(layers.gate_up, layers.down)
    return lambda layer, batch: call_layer(made[layer], batch.x, batch.weights, batch.experts)


def transformers_grouped_mm(layers: Layers) -> Compute:
    """transformers' function on what its experts modules hold."""
    modules = [
        SimpleNamespace(
            num_experts=EXPERTS,
            gate_up_proj=gate_up,
            down_proj=down,
            has_gate=True,
            has_bias=False,
            is_transposed=False,
            _is_expert_parallel=False,
            _apply_gate=gated_silu,
        )
        for gate_up, down in zip(layers.gate_up, layers.down, strict=True)
    ]

    def compute(layer: int, batch: Batch) -> torch.Tensor:
        weights = batch.weights.to(batch.x.dtype)
        output: torch.Tensor = grouped_mm_experts_forward(
            modules[layer % len(modules)], batch.x, batch.experts, weights
        )
        return output

    return compute


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def loop(layers: Layers, layer: int, batch: Batch) -> torch.Tensor:
    """One expert after another, with plain linear layers."""
    output = torch.empty_like(batch.x)
    layer %= len(layers.down)
    chosen = batch.experts[:, 0]
    for expert in range(EXPERTS):
        rows = torch.nonzero(chosen == expert)[:, 0]
        if len(rows):
            inner = gated_silu(F.linear(batch.x[rows], layers.gate_up[layer, expert]))
            weighted = F.linear(inner, layers.down[layer, expert]) * batch.weights[rows]
            output[rows] = weighted.to(output.dtype)
    return output


def check(contenders: Mapping[str, Compute], right: str, batch: Batch) -> None:
    """Raises AssertionError where they do not compute the same as the contender `right`."""
    expected = contenders[right](1, batch).float()
    for compute in contenders.values():
        torch.testing.assert_close(compute(1, batch).float(), expected, atol=3e-2, rtol=3e-2)


def measure(contenders: Mapping[str, Compute], layers: Layers, batch: Batch) -> Case:
    rotation = 2 * len(layers.down)
    turns = {
        name: max(2, min(rotation, round(SECONDS_PER_TURN / seconds(partial(compute, 0, batch)))))
        for name, compute in contenders.items()
    }
    done = dict.fromkeys(contenders, 0)

    def turn(name: str) -> float:
        compute, first = contenders[name], done[name]
        done[name] += turns[name]
        # by turns from the first and the second half, whatever a turn's length
        numbers = [(number // 2 + number % 2 * rotation // 2) % rotation for number in range(first, done[name])]
        return seconds(lambda: [compute(number, batch) for number in numbers]) / turns[name]

    reader = Reader()
    found = alternate({name: partial(turn, name) for name in contenders} | {"read": reader.turn}, ROUNDS)
    read = found.pop("read")
    touched = len(numpy.unique(batch.pairs.experts))
    return Case(len(batch.x), touched * layers.bytes_per_expert, found, read)


def call_overhead_us(rows: int) -> float:
    """Microseconds of a call whose experts are so small that they cost nothing."""
    layers = Layers(*(torch.zeros(2, EXPERTS, out, SMALL, dtype=torch.bfloat16) for out in (2 * SMALL, SMALL)))
    executor = load_executor(layers)
    batch = make_batch(SMALL, rows, EXPERTS)
    calls = range(500)
    return median(
        [seconds(lambda: [executor.run(0, batch.x, batch.pairs) for _ in calls]) * 2e3 for _ in range(ROUNDS)]
    )


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
