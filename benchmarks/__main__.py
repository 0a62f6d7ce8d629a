"""Runs one benchmark, or `all` of them one after another, and prints the figures.

One benchmark prints a JSON object; `all` prints one table and writes benchmarks/results/<date>.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.environment import environment
from expertmesh.errors import ExpertMeshError

NAMES = (
    "dispatch",
    "floor",
    "scale",
    "fairness",
    "startup",
    "executor",
    "serve",
    "generate",
    "loadtest_client",
    "hot_experts",
    "load_cost",
    "checksum",
    "rebalance",
    "chaos",
    "restarts",
    "restart_gcs",
    "partition_host",
    "planner",
    "simulation_error",
)
"""Each is a module of this package with `run(cluster)`; what its figures are, its docstring says."""
APART = ("loadtest_crosscheck",)
"""Not of `all`: it installs another project's program first."""
SILENCE = "partition_host"
"""The one whose length and number of faults can be told."""


def main() -> None:
    given = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a benchmark made ends with it
    try:
        if given.name == "all":
            result = run_all(given.only)
        else:
            where = environment()
            figures = importlib.import_module(f"benchmarks.{given.name}").run(given.cluster, **given.more)
            result = figures | {"environment": where}
            print(json.dumps(result, indent=2))
    except ExpertMeshError as error:
        sys.exit(f"benchmarks: {error}")
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


def run_all(names: Sequence[str]) -> dict[str, Any]:
    """Each in a process of its own, since they bind cores and start clusters; goes on where one fails, and says so.

    Raises ExpertMeshError once all have run where one has failed.
    """
    where, results, failed = environment(), {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"benchmarks: {name} …", file=sys.stderr, flush=True)
            file = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", "benchmarks", name, f"--json={file}"]
            if _run_apart(command):
                failed.append(name)
            else:
                results[name] = json.loads(file.read_text())
    print(report.table(results))
    print(f"written to {report.write(results, where, datetime.date.today())}")
    if failed:
        raise ExpertMeshError(f"failed: {', '.join(failed)}")
    return {**results, "environment": where}


def _run_apart(command: Sequence[str]) -> int:
    """Its exit code. An interrupt is handed on, once, and what the command made has ended before it goes on."""
    # of a session of its own, so that Ctrl-C does not reach it a second time while it ends
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=["all", *NAMES, *APART])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the environment there")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="of `all`, only these")
    parser.add_argument(
        "--cluster", help="generate: a running cluster's name; default: the demo, started where it does not run"
    )
    parser.add_argument(
        "--for", type=_positive(float), dest="for_s", metavar="S", help=f"{SILENCE}: seconds of silence"
    )
    parser.add_argument("--times", type=_positive(int), metavar="N", help=f"{SILENCE}: how often")
    given = parser.parse_args()
    given.more = {name: value for name in ("for_s", "times") if (value := getattr(given, name)) is not None}
    if given.more and given.name != SILENCE:
        parser.error(f"--for and --times are for {SILENCE}")
    return given


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return number


if __name__ == "__main__":
    main()
