"""Fuzzes one target or all: `make fuzz`, or `PYTHONPATH=tests python -m fuzz TARGET --seconds N --json FILE`."""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import tempfile
from pathlib import Path

from fuzz.run import fuzz
from fuzz.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--seconds", type=float, default=600, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for the outcomes")
    arguments = parser.parse_args()
    faulthandler.enable()
    outcomes = {}
    for name, target in TARGETS.items():
        if arguments.target not in (name, "all"):
            continue
        with tempfile.TemporaryDirectory(prefix="expertmesh-fuzz-") as folder, target(Path(folder)) as made:
            outcome = outcomes[name] = fuzz(made, arguments.seconds, arguments.seed)
        print(
            f"{name}: {outcome.executions:,} executions in {outcome.seconds:g} s, {outcome.crashes} crashes, "
            f"{outcome.hangs} hangs, grew by {outcome.peak_growth_mib} MiB of {outcome.limit_mib} allowed, "
            f"{outcome.beyond_the_limit} times beyond; {dict(outcome.answers.most_common())} {outcome.fault}".rstrip(),
            flush=True,
        )
    if arguments.json is not None:
        described = {name: vars(outcome) for name, outcome in outcomes.items()}
        arguments.json.write_text(json.dumps(described, indent=2) + "\n")
    sys.exit(not all(outcome.passed() for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
