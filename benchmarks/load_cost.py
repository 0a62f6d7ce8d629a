"""What measuring its load costs a replica: recording one batch against the shortest step there is.

`share_of_step` (native, python): the time to record a batch (how long its request waited, busy share, rows of each
expert) over the time of a whole step, whose 8 rows and 16 pairs go to one replica that only echoes them; median over
rounds. A step that computes something, or has more rows, is longer: the share falls. `record_us`, `step_us`: both.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy

from benchmarks import wire
from benchmarks.measure import alternate, median, median_ratio, timed
from expert_service.load import LoadMeter

ROWS = 8
STEPS, RECORDS = 300, 20_000
EXPERTS = dict.fromkeys(range(61), 256)


def run(_cluster: str | None = None) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        manifest = wire.make_artifact(folder)
        runs: dict[str, Callable[[], float]] = {}
        for transport in wire.TRANSPORTS:
            directory = stack.enter_context(wire.directory())
            stack.enter_context(wire.replicas(folder, directory, 1, transport))
            dispatcher = stack.enter_context(wire.dispatcher(directory, manifest.fingerprint, 1, transport))
            routed = wire.routed(ROWS)
            runs[f"step {transport}"] = lambda made=dispatcher, of=routed: median(  # type: ignore[misc]
                timed(lambda: wire.step(made, 1, of), STEPS)
            )
            runs[f"record {transport}"] = RECORDERS[transport]
        found = alternate(runs)
    shares = {name: median_ratio(found[f"record {name}"], found[f"step {name}"]) for name in wire.TRANSPORTS}
    return {
        "share_of_step": {name: round(share, 5) for name, share in shares.items()},
        "record_us": {name: round(1e6 * median(found[f"record {name}"]), 3) for name in wire.TRANSPORTS},
        "step_us": {name: round(1e6 * median(found[f"step {name}"]), 1) for name in wire.TRANSPORTS},
    }


def _experts() -> list[int]:
    return wire.routed(ROWS)[1].flatten().tolist()


def record_natively() -> float:
    """Seconds for one batch."""
    import expertmesh_native

    now = time.monotonic_ns()
    meter = expertmesh_native.LoadMeter(EXPERTS, now)
    began = time.perf_counter()
    meter.record(now, 0, [now - 50_000], _experts(), ROWS, RECORDS)
    return (time.perf_counter() - began) / RECORDS


def record_in_python() -> float:
    """Seconds for one batch."""
    now = time.monotonic()
    meter, experts = LoadMeter(EXPERTS, now), numpy.array(_experts(), dtype=numpy.int32)
    began = time.perf_counter()
    for _ in range(RECORDS):
        meter.waits.took(now, [50e-6])
        meter.begin(now)
        meter.end(now, 0, ROWS, experts)
    return (time.perf_counter() - began) / RECORDS


RECORDERS: dict[str, Callable[[], float]] = {"native": record_natively, "python": record_in_python}
