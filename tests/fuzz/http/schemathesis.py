"""schemathesis in a virtual environment of its own: some of its packages want other versions than ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from expertmesh.errors import ClusterError
from fuzz.http.exchange import LIMIT_S, Exchange, recorded

LOCK = Path(__file__).parents[3] / "requirements" / "schemathesis.txt"
FOLDER = Path(sys.prefix) / "schemathesis"
INSTALL_S = 600.0
BEYOND_S = 300.0
"""How long it may go on after its time: it ends what it has begun."""
SHOWED_FAILURES = 1


def install() -> Path:
    """The program, in the locked versions."""
    stamp, program = FOLDER / "installed.txt", FOLDER / "bin" / "schemathesis"
    if not stamp.exists() or stamp.read_text() != LOCK.read_text():
        _run([sys.executable, "-m", "venv", "--clear", str(FOLDER)])
        pip = [str(FOLDER / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
        _run([*pip, "--no-deps", "--require-hashes", "-r", str(LOCK)])
        stamp.write_text(LOCK.read_text())
    return program


def run(program: Path, url: str, schema: dict[str, Any], seconds: float, seed: int, folder: Path) -> list[Exchange]:
    """What it sent to the server at `url`, valid by the schema and not, and what came back; its files go to `folder`.

    The same seed tries the same in the same order; the time decides how much of it. Raises ClusterError where it fails.
    """
    given, record = folder / "openapi.json", folder / "requests.har"
    given.write_text(json.dumps(schema))
    options = {
        "url": url,
        "mode": "all",
        "phases": "examples,coverage,fuzzing",
        "checks": "not_a_server_error",
        "seed": str(seed),
        "max-time": str(max(1, round(seconds))),
        "request-timeout": str(LIMIT_S),
        "generation-database": "none",
        "suppress-health-check": "all",
        "warnings": "off",
        "output-sanitize": "false",
        "report": "har",
        "report-har-path": str(record),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    flags = ["--continue-on-failure", "--no-shrink", "--report-preserve-bytes"]
    command = [str(program), "--no-color", "run", str(given), *words, *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds + BEYOND_S, check=False)
    (folder / "schemathesis.log").write_text(done.stdout + done.stderr)
    if done.returncode not in (0, SHOWED_FAILURES) or not record.exists():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise ClusterError(f"schemathesis: exit code {done.returncode}: {''.join(last)}")
    return recorded(json.loads(record.read_text()))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    if done.returncode:
        raise ClusterError(f"{' '.join(command[:3])}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
