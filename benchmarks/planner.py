"""expertmesh's placement beside EPLB's, at the same slots and devices; and how long a whole plan takes.

EPLB is `expertmesh/placement/eplb.py`: the published algorithm (global policy), vectorised over layers. Each case
EXPERTSxSLOTS/DEVICES zipfS places the experts of every layer; loads follow Zipf's law with exponent S and 10 % noise,
in another order in each layer; an expert's load is split equally between its copies. `balancedness` is the mean over
layers of mean / maximum load per device, its ratio to EPLB's that of the worst layer, and
`worst_balancedness_ratio_to_eplb` the least of all layers and cases. Both take turns; times are of one placement of all
layers. `time_ratio_to_eplb` is of all cases together, `time_ratio_to_eplb_per_case` of each, where the smallest take
0.1 to 0.3 ms. `plan_s` is a plan for groups of a running cluster, 61 layers of 256 experts, from loads to sections of
a config.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import numpy

from benchmarks import measure
from expertmesh.placement.arrays import Floats, Indices, balancedness, device_loads
from expertmesh.placement.balance import place
from expertmesh.placement.eplb import eplb
from expertmesh.placement.loads import Loads
from expertmesh.placement.make import Bounds, propose
from expertmesh.placement.planner import Aims
from expertmesh.placement.shapes import Shape

EXPONENTS = (0.5, 0.8, 1.0, 1.2)
SIZES = (
    (32, 8, 8, 4),
    (32, 8, 12, 4),
    (32, 16, 16, 8),
    (32, 16, 24, 8),
    (48, 64, 64, 16),
    (48, 64, 80, 16),
    (61, 256, 256, 64),
    (61, 256, 320, 64),
    (61, 256, 320, 32),
)
"""Layers, experts per layer, slots per layer, devices: without and with spare slots."""
ROUNDS, CALLS, PLAN_ROUNDS = 9, 5, 5
WAYS = {"expertmesh": place, "eplb": eplb}
PLAN_AIMS = {"": Aims(rows_per_replica=50.0), ", 12 groups": Aims(rows_per_replica=50.0, groups=12)}
Figures = dict[str, object]


@dataclass(frozen=True)
class Case:
    layers: int
    experts: int
    slots: int
    devices: int
    exponent: float

    def __str__(self) -> str:
        return f"{self.experts}x{self.slots}/{self.devices} zipf{self.exponent}"

    def loads(self) -> Floats:
        return zipf_loads(self.layers, self.experts, self.exponent)


def run(cluster: str | None) -> Figures:
    """Needs no cluster."""
    cases = [Case(*size, exponent) for size in SIZES for exponent in EXPONENTS]
    even = {str(case): _balancedness(case) for case in cases}
    seconds = {str(case): _seconds(case) for case in cases}
    together = {
        way: [sum(one) for one in zip(*(found[way] for found in seconds.values()), strict=True)] for way in WAYS
    }
    ratios = {case: float((ours / theirs).min()) for case, (ours, theirs) in even.items()}
    mean_ratios = [float(ours.mean() / theirs.mean()) for ours, theirs in even.values()]
    per_case = {
        case: round(measure.median_ratio(found["expertmesh"], found["eplb"]), 2) for case, found in seconds.items()
    }
    return {
        "worst_balancedness_ratio_to_eplb": round(min(ratios.values()), 6),
        "best_balancedness_ratio_to_eplb": round(max(mean_ratios), 6),
        "time_ratio_to_eplb": round(measure.median_ratio(together["expertmesh"], together["eplb"]), 3),
        "balancedness": {case: round(float(ours.mean()), 4) for case, (ours, _) in even.items()},
        "balancedness_eplb": {case: round(float(theirs.mean()), 4) for case, (_, theirs) in even.items()},
        "balancedness_ratio_to_eplb": {case: round(ratio, 6) for case, ratio in ratios.items()},
        "time_ratio_to_eplb_per_case": per_case,
        "eplb_ms": {case: round(1e3 * measure.median(found["eplb"]), 3) for case, found in seconds.items()},
        "plan_s": _plan_seconds(),
    }


def zipf_loads(layers: int, experts: int, exponent: float, seed: int = 0) -> Floats:
    """[L, E] shares: Zipf's law with 10 % noise, in another order in each layer."""
    generator = numpy.random.default_rng(seed)
    by_rank = numpy.arange(1, experts + 1, dtype=numpy.float64) ** -exponent
    noisy = by_rank / by_rank.sum() * generator.uniform(0.9, 1.1, (layers, experts))
    shuffled: Floats = generator.permuted(noisy, axis=1)
    return shuffled


def _balancedness(case: Case) -> tuple[Floats, Floats]:
    """Per layer: expertmesh's, EPLB's."""
    loads = case.loads()

    def even(placed: Indices) -> Floats:
        return balancedness(device_loads(loads, placed, case.devices))

    return even(place(loads, case.slots, case.devices)), even(eplb(loads, case.slots, case.devices))


def _seconds(case: Case) -> dict[str, list[float]]:
    """Per round, the median of a few calls."""
    loads = case.loads()
    calls = {name: functools.partial(way, loads, case.slots, case.devices) for name, way in WAYS.items()}
    rounds = measure.alternate(
        {name: functools.partial(measure.timed, call, CALLS) for name, call in calls.items()}, ROUNDS
    )
    return {name: [measure.median(one) for one in found] for name, found in rounds.items()}


def _plan_seconds() -> dict[str, float]:
    shape = Shape(layers=61, experts=256, top_k=8, hidden=7168, intermediate=2048, bytes_per_weight=1)
    manifest = shape.manifest("planner")
    found = {}
    for exponent in EXPONENTS:
        rates = 1000 * zipf_loads(61, 256, exponent) / 61
        loads = Loads(rows_per_s={layer: tuple(row) for layer, row in enumerate(rates.tolist())})
        for name, aims in PLAN_AIMS.items():
            seconds = []
            for _ in range(PLAN_ROUNDS):
                began = time.perf_counter()
                propose(manifest, loads, aims, Bounds())
                seconds.append(time.perf_counter() - began)
            found[f"zipf{exponent}{name}"] = round(measure.median(seconds), 2)
    return found
