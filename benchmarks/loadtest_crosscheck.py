"""The same run by `expertmesh loadtest` and by NVIDIA's aiperf, installed into a virtual environment of its own.

aiperf's inter-token latency is a mean per request, vLLM's TPOT; its inter-chunk latency is what vLLM calls ITL.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.stub import stub_server
from examples import demo
from expertmesh.cluster import record
from expertmesh.errors import ClusterError
from loadtest import metrics
from loadtest.config import RunConfig
from loadtest.run import execute

AIPERF = "aiperf==0.13.0"
FOLDER = Path(sys.prefix) / "aiperf"
RATE, REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 4.0, 80, 64, 24
TIMEOUT_S = 600
FIGURES = {
    "ttft": "time_to_first_token",
    "tpot": "inter_token_latency",
    "itl": "inter_chunk_latency",
    "e2e": "request_latency",
}


def run(cluster: str | None) -> dict[str, object]:
    """Against that cluster; by default against a stub, started anew for each with the same draws of latencies."""
    program = install()
    with endpoint(cluster) as (url, model):
        ours = measure_ours(url, model)
    with endpoint(cluster) as (url, model):
        theirs = measure_aiperf(program, url, model)
    return {
        "median_ms": ours,
        "aiperf_median_ms": theirs,
        "ratio_to_aiperf": {name: round(ours[name] / theirs[name], 4) for name in ours},
        "requests": REQUESTS,
        "rate": RATE,
        "target": f"cluster {cluster}" if cluster else "stub",
        "aiperf": AIPERF,
    }


@contextmanager
def endpoint(cluster: str | None) -> Iterator[tuple[str, str]]:
    """Its URL without /v1, and its model."""
    if cluster is not None:
        known = record.require(cluster)
        yield known.http, known.model
    else:
        with stub_server("--ttft", "0.1", "0.4", "--itl", "0.02", "0.04") as stub:
            yield stub.url, "stub"


def install() -> Path:
    """The program, installed the first time (1.2 GB)."""
    program = FOLDER / "bin" / "aiperf"
    if not program.exists():
        _run([sys.executable, "-m", "venv", "--clear", str(FOLDER)])
        _run([str(FOLDER / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", AIPERF])
    return program


def measure_ours(url: str, model: str) -> dict[str, float]:
    config = RunConfig.model_validate(
        {
            "target": {"kind": "openai", "url": f"{url}/v1", "model": model},
            "stages": [
                {"name": "main", "duration_s": REQUESTS / RATE, "arrivals": {"kind": "constant", "rate": RATE}},
            ],
            "workload": {
                "prompt_tokens": {"kind": "fixed", "value": PROMPT_TOKENS},
                "output_tokens": {"kind": "fixed", "value": OUTPUT_TOKENS},
                "tokenizer": str(demo.CHECKPOINT),
            },
            "client": {"warmup_requests": 1},
        }
    )
    values = metrics.values_of(execute(config, Console(quiet=True)).records)
    return {name: round(float(1000 * np.median(values[name])), 2) for name in FIGURES}


def measure_aiperf(program: Path, url: str, model: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": model,
            "url": url,
            "endpoint-type": "completions",
            "tokenizer": str(demo.CHECKPOINT),
            "request-rate": str(RATE),
            "arrival-pattern": "constant",
            "request-count": str(REQUESTS),
            "warmup-request-count": "1",
            "synthetic-input-tokens-mean": str(PROMPT_TOKENS),
            "output-tokens-mean": str(OUTPUT_TOKENS),
            "extra-inputs": '{"ignore_eos": true, "temperature": 0}',
            "artifact-dir": folder,
            "random-seed": "1",
            "ui": "none",
        }
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        flags = ["--streaming", "--use-legacy-max-tokens", "--use-server-token-count"]
        _run([str(program), "profile", *options, *flags])
        found = json.loads((Path(folder) / "profile_export_aiperf.json").read_text())
    if found["request_count"]["avg"] != REQUESTS:
        raise ClusterError(f"aiperf: {found['request_count']['avg']} of {REQUESTS} requests were answered")
    return {name: round(found[theirs]["p50"], 2) for name, theirs in FIGURES.items()}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        tail = (done.stderr or done.stdout).strip()[-500:]
        raise ClusterError(f"{' '.join(command[:3])}: exit code {done.returncode}: {tail}")
