"""A stub server in a process of its own, as tests see it; runs against it."""

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

from rich.console import Console

from loadtest.config import RunConfig
from loadtest.records import Run
from loadtest.run import execute

SCRIPT = Path(__file__).with_name("stub_server.py")
ROOT = SCRIPT.parent.parent.parent


@dataclass(frozen=True)
class StubServer:
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.load(answer)

    def log(self) -> dict[str, dict[str, Any]]:
        """Request id -> when it arrived and when its tokens were due, seconds of time.monotonic()."""
        return {one["id"]: one for one in self.get("/log")["answers"]}


@contextmanager
def stub_server(*arguments: str) -> Iterator[StubServer]:
    process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield StubServer(int(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


def poisson(rate: float, duration_s: float, **more: Any) -> dict[str, Any]:
    """A stage."""
    return {"name": "main", "duration_s": duration_s, "arrivals": {"kind": "poisson", "rate": rate} | more}


def config_for(url: str, *stages: dict[str, Any], **sections: Any) -> RunConfig:
    target = {"kind": "openai", "url": url} | sections.pop("target", {})
    return RunConfig.model_validate({"target": target, "stages": list(stages)} | sections)


def execute_quietly(config: RunConfig) -> Run:
    return execute(config, Console(stderr=True, quiet=True))


def run_command(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """`expertmesh loadtest ...` as a user would."""
    command = [sys.executable, "-m", "expertmesh", "loadtest", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
