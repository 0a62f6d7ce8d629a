"""Tokens per second of a cluster over its OpenAI API, alone and with four streams at once."""

from __future__ import annotations

from benchmarks.load import run_load
from examples import demo
from expertmesh.cluster import launch, local_ray, record
from expertmesh.cluster.record import Record
from expertmesh.commands.up import bring_up

CONCURRENCIES = (1, 4)
PROMPTS_PER_STREAM = 4
MAX_TOKENS = 64


def run(cluster: str | None) -> dict[str, object]:
    """Of the cluster with that name; by default of the demo, which is started and stopped where it does not run."""
    if cluster is not None:
        return measure(record.require(cluster))
    plan = demo.make_plan(*local_ray.free_ports(2))
    known = launch.known_cluster(plan)
    if known is not None:
        return measure(known)
    started = bring_up(plan, None, demo.READY_S)
    try:
        return measure(started)
    finally:
        launch.stop(started)


def measure(target: Record) -> dict[str, object]:
    """Figures per number of concurrent streams, after a warm-up; every answer has MAX_TOKENS tokens."""
    prompts = demo.prompts()
    url = f"{target.http}/v1"
    run_load(url, target.model, prompts[: max(CONCURRENCIES)], max(CONCURRENCIES), 8)
    found = {
        str(streams): run_load(url, target.model, prompts[: streams * PROMPTS_PER_STREAM], streams, MAX_TOKENS)
        for streams in CONCURRENCIES
    }
    return {
        "tokens_per_s": {streams: round(figures.tokens_per_s, 2) for streams, figures in found.items()},
        "first_token_ms": {streams: round(figures.first_token_ms, 1) for streams, figures in found.items()},
        "answers": {streams: figures.answers for streams, figures in found.items()},
        "tokens_per_answer": MAX_TOKENS,
        "model": target.model,
    }
