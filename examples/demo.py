"""The demo, `make demo`: the committed model behind the OpenAI API, its experts in four services of their own."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.load import run_load
from expertmesh.cluster import launch
from expertmesh.cluster.record import Record
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.cluster.status import ClusterStatus, join
from expertmesh.commands.console import err, out
from expertmesh.commands.generate import stream
from expertmesh.commands.prepare import run_prepare
from expertmesh.commands.up import bring_up, print_addresses, stay_up
from expertmesh.config import ServerSection
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError, ExpertMeshError

EXAMPLES = Path(__file__).parent
CHECKPOINT = EXAMPLES / "demo_model" / "checkpoint"
CONFIG = EXAMPLES / "demo.yaml"
WORK = EXAMPLES.parent / ".demo"
READY_S = 600.0
FIRST_PROMPT = 'def read_lines(path):\n    """Return the lines of a text file."""\n'
STREAMS = 4
PROMPTS_PER_STREAM = 8
MAX_TOKENS = 48
REPORT_S = 3.0
"""Replicas tell the directory their load once a second or so."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="one completion and a short load test, then stop")
    parser.add_argument("--http-port", type=int, help="of the OpenAI API")
    parser.add_argument("--grpc-port", type=int, help="of the directory")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(given.once, given.http_port, given.grpc_port)
    except ExpertMeshError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def run(once: bool, http_port: int | None, grpc_port: int | None) -> None:
    plan = make_plan(http_port, grpc_port)
    known = launch.known_cluster(plan)
    if known is not None:
        raise ClusterError(
            f"the demo already runs at {known.http}; stop it with `.venv/bin/expertmesh down {known.name}`"
        )
    running = bring_up(plan, None, READY_S)
    try:
        print_addresses(running)
        first_completion(running)
        if once:
            load_test(running)
        else:
            suggest(running)
            stay_up(running)
    finally:
        err.print("stopping")
        launch.stop(running)


def make_plan(http_port: int | None, grpc_port: int | None) -> launch.Plan:
    """Prepares the artifact where that has not been done, and checks the config with these ports instead of its own."""
    prepare_artifact()
    plan = launch.read_plan(CONFIG)
    ports = {"http_port": http_port, "grpc_port": grpc_port}
    changed = plan.config.server.model_dump() | {key: port for key, port in ports.items() if port is not None}
    server = ServerSection.model_validate(changed)
    return replace(plan, config=plan.config.model_copy(update={"server": server}))


def prepare_artifact() -> None:
    """.demo/artifact from the committed checkpoint; made again where the checkpoint has changed."""
    digest = hashlib.sha256()
    for path in sorted(CHECKPOINT.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    artifact, stamp = WORK / "artifact", WORK / "checkpoint.sha256"
    if not stamp.exists() or stamp.read_text() != digest.hexdigest():
        shutil.rmtree(artifact, ignore_errors=True)
        WORK.mkdir(exist_ok=True)
        stamp.write_text(digest.hexdigest())
    run_prepare(CHECKPOINT, artifact)


def prompts() -> list[str]:
    """Held-out beginnings of all kinds of text that the model knows, in turn."""
    kinds: dict[str, list[str]] = json.loads((CHECKPOINT / "prompts.json").read_text())
    return [prompt for row in zip(*kinds.values(), strict=True) for prompt in row]


def first_completion(running: Record) -> None:
    out.print("\nA first completion:", style="bold")
    out.print(FIRST_PROMPT, end="", style="dim", markup=False, highlight=False)
    url = f"{running.http}/v1"
    for piece in stream(url, running.model, FIRST_PROMPT, max_tokens=64, temperature=0, seed=None, chat=False):
        out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    out.print("\n")


def load_test(running: Record) -> None:
    """Prints tokens/s and each group's rows; raises ClusterError where a group computed none."""
    before = rows_of_groups(running)
    chosen = prompts()[: STREAMS * PROMPTS_PER_STREAM]
    figures = run_load(f"{running.http}/v1", running.model, chosen, STREAMS, MAX_TOKENS)
    out.print(
        f"load: {STREAMS} streams, {figures.answers} answers, {figures.tokens} tokens in {figures.seconds:.1f} s: "
        f"{figures.tokens_per_s:.1f} tokens/s, first token after {figures.first_token_ms:.0f} ms (median)",
        highlight=False,
        soft_wrap=True,
    )
    time.sleep(REPORT_S)
    rows = {group: total - before.get(group, 0) for group, total in rows_of_groups(running).items()}
    out.print("rows: " + ", ".join(f"group {group} {count}" for group, count in rows.items()), highlight=False)
    if idle := [group for group, count in rows.items() if not count]:
        raise ClusterError(f"no rows were computed by group {', '.join(idle)}")


def rows_of_groups(running: Record) -> dict[str, int]:
    return {group.name: group.rows_total for group in status_of(running).groups}


def status_of(running: Record) -> ClusterStatus:
    details = ServeApi(running.dashboard, running.token).details()
    return join(running, details, list_table(running.directory))


def suggest(running: Record) -> None:
    out.print("In another terminal:", style="bold")
    out.print('  .venv/bin/expertmesh generate "def fibonacci(n):"', highlight=False)
    out.print("  .venv/bin/expertmesh status", highlight=False)
    body = json.dumps({"model": running.model, "prompt": "The", "max_tokens": 16})
    command = f"curl {running.http}/v1/completions -H 'content-type: application/json' -d '{body}'"
    out.print(f"  {command}\n", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
