"""Fuzzes the HTTP API: `make fuzz-http`, or `PYTHONPATH=tests python -m fuzz.http --seconds N --json FILE`.

schemathesis sends requests that its schema allows and such that it does not to the demo model on a cluster of its own.
What got a 5xx, or no answer in time, is sent to plain vLLM too: where that does better, it is a finding. Exits with 1
where there is one, or where the engine answers no ordinary request afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serve import api_server
from examples import demo
from expertmesh.cluster import launch, local_ray, record
from expertmesh.commands.prepare import run_prepare
from expertmesh.commands.up import bring_up
from expertmesh.config import ClusterConfig
from expertmesh.errors import ExpertMeshError
from fuzz.http import schemathesis
from fuzz.http.exchange import LIMIT_S, Exchange, Request, send
from fuzz.http.findings import Comparison, findings, summary
from fuzz.http.narrow import narrowed

NAME = "fuzz-http"
WORK = Path(__file__).parents[3] / ".bench" / NAME
MODEL = "demo"
GROUPS = {"a": "0-7", "b": "8-15"}
MAX_MODEL_LEN = 256
"""Bounds what a request may cost, whatever it asks for."""
KV_CACHE_GIB = 0.25
READY_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz.http", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cluster", help="the name of one that runs, with the demo model, instead of one of its own")
    parser.add_argument("--json", type=Path, help="a file for the outcome")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    WORK.mkdir(parents=True, exist_ok=True)
    try:
        outcome = fuzz(given.seconds, given.seed, given.cluster)
    except ExpertMeshError as error:
        sys.exit(f"fuzz-http: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if given.json is not None:
        given.json.write_text(json.dumps(outcome, indent=2) + "\n")
    sys.exit(bool(outcome["findings"]) or not outcome["alive"])


def fuzz(seconds: float, seed: int, cluster: str | None) -> dict[str, Any]:
    """Sends, compares and prints."""
    program = schemathesis.install()
    with served(cluster) as (url, model):
        schema = narrowed(fetch(f"{url}/openapi.json"), model)
        exchanges = schemathesis.run(program, url, schema, seconds, seed, WORK)
        alive = answers(url, model)
    routes = [*schema["paths"]]
    sent = summary(exchanges, routes)
    for path, counted in sent.items():
        told = ", ".join(f"{count} with {status}" for status, count in counted.items())
        print(f"{path}: {sum(counted.values()):,} requests: {told}", flush=True)
    failed = [one for one in exchanges if one.failed]
    compared = compare(failed, model)
    found = findings(compared, routes)
    for finding in found:
        print(finding.line())
    alike = sum(not one.is_finding for one in compared)
    print(
        f"{len(exchanges):,} requests, {len(failed)} with 5xx or no answer, {alike} of these by plain vLLM too, "
        f"{len(found)} findings; a completion afterwards was {'answered' if alive else 'not answered'}"
    )
    lines = [finding.line() for finding in found]
    return {"requests": sent, "failed": len(failed), "failed_by_plain": alike, "findings": lines, "alive": alive}


@contextlib.contextmanager
def served(cluster: str | None) -> Iterator[tuple[str, str]]:
    """URL and model of that cluster, or of a new one, which ends afterwards."""
    if cluster is not None:
        known = record.require(cluster)
        yield known.http, known.model
        return
    artifact = WORK / "artifact"
    run_prepare(demo.CHECKPOINT, artifact)
    http, grpc = local_ray.free_ports(2)
    config = ClusterConfig.model_validate(
        {
            "name": NAME,
            "model": {"artifact": str(artifact), "name": MODEL},
            "engine": {"max_model_len": MAX_MODEL_LEN, "kv_cache_gib": KV_CACHE_GIB, "enforce_eager": True},
            "groups": [{"name": name, "experts": experts} for name, experts in GROUPS.items()],
            "server": {"http_port": http, "grpc_port": grpc},
        }
    )
    path = WORK / "cluster.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    running = bring_up(launch.read_plan(path), None, READY_S)
    try:
        yield running.http, running.model
    finally:
        launch.stop(running)


def compare(failed: Sequence[Exchange], model: str) -> list[Comparison]:
    """With plain vLLM, which is started where there is anything to compare."""
    if not failed:
        return []
    arguments = {
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_memory_bytes": int(KV_CACHE_GIB * 2**30),
        "enforce_eager": True,
    }
    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with api_server(demo.CHECKPOINT, arguments, environment, name=model, logs=WORK) as (url, _):
        return [Comparison(one.request, one.answer, send(url, one.request)) for one in failed]


def answers(url: str, model: str) -> bool:
    """Whether the engine answers an ordinary request."""
    body = json.dumps({"model": model, "prompt": demo.FIRST_PROMPT, "max_tokens": 8}).encode()
    asked = Request("POST", "/v1/completions", (("content-type", "application/json"),), body)
    return send(url, asked).status == 200


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=LIMIT_S) as response:
        return json.load(response)


if __name__ == "__main__":
    main()
