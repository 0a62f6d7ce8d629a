"""What `engine.checksums` costs: the round trip of a dispatch with checksums over one without, to the same replicas.

For each case ROWSxREPLICAS two routers take turns, with and without; rows of 1 KiB (hidden 512, bf16) go to replicas
that echo them. `ratio` is the median over the rounds of median over median; `off_us`, `on_us`: both. What begins with
`python_` is of the Python transport, to replicas of its kind.
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import wire
from benchmarks.echo import CALLER_CORES
from benchmarks.measure import alternate, median, median_ratio, timed
from router_service.dispatcher import Dispatcher

CASES = ((16, 1), (16, 4), (256, 1))
ROUNDS, CALLS = 15, 300


def run(_cluster: str | None = None) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    os.sched_setaffinity(0, CALLER_CORES)
    figures: dict[str, dict[str, float]] = {}
    for transport in wire.TRANSPORTS:
        prefix = "" if transport == wire.TRANSPORTS[0] else f"{transport}_"
        for (rows, count), (off, on) in _measure(transport).items():
            case = f"{rows}x{count}"
            figures.setdefault(f"{prefix}ratio", {})[case] = round(median_ratio(on, off), 3)
            figures.setdefault(f"{prefix}off_us", {})[case] = round(1e6 * median(off), 1)
            figures.setdefault(f"{prefix}on_us", {})[case] = round(1e6 * median(on), 1)
    return figures


def _measure(transport: str) -> dict[tuple[int, int], tuple[list[float], list[float]]]:
    """Case -> the median of each round, seconds, without and with."""
    most = max(count for _, count in CASES)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        manifest = wire.make_artifact(folder)
        directory = stack.enter_context(wire.directory())
        stack.enter_context(wire.replicas(folder, directory, most, transport))
        open_router = functools.partial(wire.dispatcher, directory, manifest.fingerprint, most, transport)
        routers = [stack.enter_context(open_router(checksums=checksums)) for checksums in (False, True)]
        found = {}
        for rows, count in CASES:
            ways = {str(number): functools.partial(_median, made, count, rows) for number, made in enumerate(routers)}
            rounds = alternate(ways, ROUNDS)
            found[rows, count] = rounds["0"], rounds["1"]
    return found


def _median(made: Dispatcher, count: int, rows: int) -> float:
    routed = wire.routed(rows)
    return median(timed(lambda: wire.step(made, count, routed), CALLS))
