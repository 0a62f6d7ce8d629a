"""Runs one benchmark and prints its figures, as JSON into a file too where one is named."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import generate
from benchmarks.environment import environment
from expertmesh.errors import ExpertMeshError

BENCHMARKS = {"generate": generate.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the environment there")
    parser.add_argument("--cluster", help="a running cluster's name; default: the demo, started where it does not run")
    given = parser.parse_args()
    try:
        figures = BENCHMARKS[given.name](given.cluster)
    except ExpertMeshError as error:
        sys.exit(f"benchmarks: {error}")
    result = json.dumps(figures | {"environment": environment()}, indent=2)
    print(result)
    if given.json is not None:
        given.json.write_text(result + "\n")


if __name__ == "__main__":
    main()
