"""`python -m expertmesh.cluster.smoke`: does a cluster that runs somewhere answer? What `helm test` runs.

Asks Ray Serve's gRPC health check, the directory for a ready replica of each group, and the OpenAI API for a
completion, with the key of OPENAI_API_KEY where there is one, or, with `--no-key`, that it is refused without one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import grpc
import httpx
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from expertmesh.api_keys import client_key
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError, ExpertMeshError
from expertmesh.retry import retry
from expertmesh.v1 import expert_pb2
from expertmesh.wire.tls import TlsFiles

PROMPT = "The capital of France is"
CALL_S = 30.0
PAUSE_S = 2.0


def check_health(address: str) -> str:
    """Asks Ray Serve's gRPC proxy; raises ClusterError where it is not healthy."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = serve_pb2_grpc.RayServeAPIServiceStub(channel).Healthz(serve_pb2.HealthzRequest(), timeout=CALL_S)
        except grpc.RpcError as error:
            raise ClusterError(f"gRPC health check at {address}: {error.code().name}: {error.details()}") from None
    return f"gRPC health check: {answer.message}"


def check_groups(address: str, groups: Collection[str], tls: TlsFiles | None = None) -> str:
    """Raises ClusterError naming the groups of which the directory knows no ready replica."""
    replicas = list_table(address, CALL_S, tls).replicas
    ready = {one.group for one in replicas if one.state == expert_pb2.REPLICA_STATE_READY}
    missing = sorted(set(groups) - ready)
    if missing:
        raise ClusterError(f"directory at {address}: no ready replica of group {', '.join(missing)}")
    return f"directory: {len(replicas)} replicas of {len(ready)} groups"


def check_completion(url: str, model: str) -> str:
    """Raises ClusterError where the OpenAI API gives no completion."""
    key = client_key()
    try:
        answer = _complete(url, model, {"Authorization": f"Bearer {key}"} if key else {})
        if answer.status_code != httpx.codes.OK:
            raise ClusterError(f"completion at {url}: HTTP {answer.status_code}: {answer.text[:200]}")
        text = answer.json()["choices"][0]["text"]
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        raise ClusterError(f"completion at {url}: {error!r}") from None
    return f"completion: {PROMPT!r} -> {text!r}"


def check_refusal(url: str, model: str) -> str:
    """Raises ClusterError where the OpenAI API does anything but refuse a completion without a key."""
    try:
        answer = _complete(url, model, {})
    except httpx.HTTPError as error:
        raise ClusterError(f"completion at {url}: {error!r}") from None
    if answer.status_code != httpx.codes.UNAUTHORIZED:
        raise ClusterError(f"completion at {url} without a key: HTTP {answer.status_code} instead of 401")
    return "completion: refused without a key; none was given to ask for one (apiKeys.testSecret)"


def _complete(url: str, model: str, headers: dict[str, str]) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    with httpx.Client(trust_env=False, timeout=CALL_S) as client:
        return client.post(f"{url}/v1/completions", json=body, headers=headers)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m expertmesh.cluster.smoke", description=__doc__)
    parser.add_argument("--url", required=True, help="of the OpenAI API, without /v1")
    parser.add_argument("--grpc", required=True, help="HOST:PORT of Ray Serve's gRPC proxy")
    parser.add_argument("--directory", metavar="HOST:PORT", help="of the directory, where it asks for certificates")
    parser.add_argument("--tls", type=Path, metavar="DIR", help="with --directory: ca.crt, tls.crt and tls.key")
    parser.add_argument("--tls-name", metavar="NAME", help="with --tls: what its certificate bears")
    parser.add_argument("--model", required=True)
    parser.add_argument("--groups", nargs="*", default=[], help="that must have a ready replica")
    parser.add_argument("--no-key", action="store_true", help="the API asks for a key, and there is none to give")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS")
    given = parser.parse_args()
    tls = TlsFiles.in_folder(given.tls, given.tls_name) if given.tls else None
    deadline = time.monotonic() + given.timeout
    checks: list[Callable[[], str]] = [
        lambda: check_health(given.grpc),
        lambda: check_groups(given.directory or given.grpc, given.groups, tls),
        lambda: (check_refusal if given.no_key else check_completion)(given.url, given.model),
    ]
    try:
        for check in checks:
            print(retry(check, ClusterError, deadline - time.monotonic(), PAUSE_S), flush=True)
    except ExpertMeshError as error:
        sys.exit(f"smoke: {error}")


if __name__ == "__main__":
    main()
