"""Cost of one layer as replicas and routers grow: 16 rows, top-2, hidden 512, bf16, experts that only echo.

Every process is real; the rows are spread over all replicas. `router_us_per_replica` is the slope of a router process's
CPU time per layer over the number of replicas, all its threads counted. Counts take turns; figures are medians over
the rounds. On a machine with fewer cores than processes the round trip grows with the replicas' own work, which the
router's CPU time does not contain.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import measure, wire
from benchmarks.echo import CORES, line_of

ROUTERS = (1, 2, 4)
LAYERS = 200
ROUNDS = 5

Figures = dict[str, float]


def run(cluster: str | None) -> dict[str, object]:
    """Needs no cluster. Keys without a prefix are of the fastest transport that is there."""
    found: dict[str, object] = {"rows": 16, "layers_per_round": LAYERS}
    for transport in wire.TRANSPORTS:
        prefix = "" if transport == wire.TRANSPORTS[0] else f"{transport}_"
        found |= {f"{prefix}{name}": figure for name, figure in _measure(transport).items()}
    return found


def _measure(transport: str) -> dict[str, object]:
    with _routers(transport) as routers:
        alone = {str(count): functools.partial(_run, routers[:1], count) for count in wire.COUNTS}
        by_replicas = measure.alternate(alone, ROUNDS)
        splits = measure.alternate(
            {str(count): functools.partial(_ask, routers[:1], count, split=True) for count in wire.COUNTS}, ROUNDS
        )
        together = {str(count): functools.partial(_run, routers[:count], 2) for count in ROUTERS}
        by_routers = measure.alternate(together, ROUNDS)
    cpu_us = {count: measure.median([one["cpu_us"] for one in rounds]) for count, rounds in by_replicas.items()}
    return {
        "router_us_per_replica": round(measure.slope({float(count): cpu for count, cpu in cpu_us.items()}), 1),
        "router_cpu_us_by_replicas": _rounded(cpu_us),
        **{f"round_trip_{name}_by_replicas": _medians(by_replicas, name) for name in ("p50_us", "p99_us")},
        **{f"{name}_by_routers": _medians(by_routers, name) for name in ("cpu_us", "p50_us", "p99_us", "layers_per_s")},
        "split_us_by_replicas": {
            count: _rounded({name: measure.median([one[0][name] for one in rounds]) for name in rounds[0][0]})
            for count, rounds in splits.items()
        },
    }


def _medians(rounds: dict[str, list[Figures]], name: str) -> Figures:
    return _rounded({case: measure.median([one[name] for one in figures]) for case, figures in rounds.items()})


def _rounded(figures: Figures) -> Figures:
    return {name: round(figure, 1) for name, figure in figures.items()}


def _run(routers: Sequence[subprocess.Popen[str]], replicas: int) -> Figures:
    """The routers' mean, and their layers per second in all."""
    answers = _ask(routers, replicas)
    mean = {name: sum(one[name] for one in answers) / len(answers) for name in answers[0]}
    return mean | {"layers_per_s": sum(one["layers_per_s"] for one in answers)}


def _ask(routers: Sequence[subprocess.Popen[str]], replicas: int, split: bool = False) -> list[Figures]:
    for router in routers:
        assert router.stdin is not None
        print(json.dumps({"replicas": replicas, "layers": LAYERS, "split": split}), file=router.stdin, flush=True)
    return [json.loads(line_of(router)) for router in routers]


@contextlib.contextmanager
def _routers(transport: str) -> Iterator[list[subprocess.Popen[str]]]:
    """As many routers as are ever needed, each connected to as many replicas."""
    count = max(wire.COUNTS)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        manifest = wire.make_artifact(folder)
        directory = stack.enter_context(wire.directory())
        stack.enter_context(wire.replicas(folder, directory, count, transport))
        command = [sys.executable, "-m", "benchmarks.router", f"--directory={directory}", f"--replicas={count}"]
        command += [f"--fingerprint={manifest.fingerprint}", f"--transport={transport}"]
        routers = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    cwd=Path(__file__).parents[1],
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(max(ROUTERS))
        ]
        for number, router in enumerate(routers):
            os.sched_setaffinity(router.pid, {CORES[number % len(CORES)]})
        try:
            for router in routers:
                line_of(router)
            yield routers
        finally:
            for router in routers:
                router.terminate()
