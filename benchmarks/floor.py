"""The least that `dispatch` can take on this machine: C++ gRPC alone, with no work of ours at either end, beside TCP.

Both ends are C++ (`native/tools/floor.cc`, compiled first); bytes and cores are those of `dispatch`, and so is what
`ratio_to_tcp_p50` means. `tcp_us_p50` and `grpc_us_p50` are microseconds.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from benchmarks.dispatch import CALLS, ROUNDS, sizes
from expertmesh.errors import ConfigError

SOURCE = Path(__file__).parents[1] / "native" / "tools" / "floor.cc"
CASES = ((16, 1), (16, 4))


def run(cluster: str | None) -> dict[str, object]:
    """Needs no cluster, but what builds the native core; raises ConfigError where that is missing."""
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = _compile(Path(folder) / "floor")
        for rows, count in CASES:
            each = [f"{request}:{answer}" for request, answer in sizes(rows, count)]
            found = json.loads(_output([str(program), str(ROUNDS), str(CALLS), *each]))
            for key in ("ratio_to_tcp_p50", "tcp_us_p50", "grpc_us_p50"):
                figures.setdefault(key, {})[f"{rows}x{count}"] = found[key]
    return dict(figures)


def _compile(program: Path) -> Path:
    flags = _output(["pkg-config", "--cflags", "--libs", "grpc++"]).split()
    _output(["c++", "-std=c++17", "-O2", str(SOURCE), *flags, "-o", str(program)])
    return program


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise ConfigError(f"floor: no {command[0]} here, with which the native core is built too") from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"floor: {command[0]}: {' '.join(error.stderr.split())}") from None
