"""The tests' stub of an OpenAI API, its latencies known, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent.parent / "tests" / "loadtest" / "stub_server.py"


@dataclass(frozen=True)
class Stub:
    url: str
    """Without /v1."""

    def log(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/log", timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


@contextmanager
def stub_server(*arguments: str) -> Iterator[Stub]:
    process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Stub(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.kill()
        process.communicate()
