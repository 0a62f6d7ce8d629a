"""Samples of a real directory and of real metrics pages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import prometheus_client
import pytest
from mesh import running_directory, running_groups
from session_cluster import Cluster

from expertmesh.cluster.record import Record
from expertmesh.directory.client import list_table
from expertmesh.errors import ConfigError
from loadtest.config import RunConfig
from loadtest.endpoint import Endpoint
from loadtest.records import Sample
from loadtest.sampling import Sampler, ray_pages, read_page
from loadtest.target import Clock

NOWHERE = Endpoint(None, None, None, None)


def run_config(**sampling: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "target": {"kind": "experts", "directory": "127.0.0.1:1"},
            "stages": [{"name": "s", "duration_s": 1, "arrivals": {"kind": "constant", "rate": 1}}],
            "sampling": {"every_s": 0.1, **sampling},
        }
    )


def sampled(sampler: Sampler, seconds: float = 0.6) -> list[Sample]:
    sampler.start(Clock(time.monotonic()), 1)
    time.sleep(seconds)
    samples = sampler.stop()
    sampler.close()
    return samples


def values(samples: list[Sample], name: str, label: str) -> list[float]:
    return [one.value for one in samples if (one.name, one.label) == (name, label)]


@pytest.fixture
def metrics_page() -> Iterator[str]:
    """A page as vLLM's, by the library with which vLLM makes its own."""
    registry = prometheus_client.CollectorRegistry()
    running = prometheus_client.Gauge("vllm:num_requests_running", "", ["engine"], registry=registry)
    running.labels("0").set(3)
    running.labels("1").set(4)
    prometheus_client.Counter("vllm:generation_tokens", "", registry=registry).inc(1234)
    prometheus_client.Gauge("process_open_fds", "", registry=registry).set(9)
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()
    thread.join()


def test_groups_by_the_directory(demo_artifact: Path) -> None:
    with running_directory() as directory:
        endpoint = Endpoint(None, None, directory, None)
        sampler = Sampler(run_config(), endpoint)
        with running_groups(demo_artifact, directory, 2):
            sampler.start(Clock(time.monotonic()), 1)
            time.sleep(1.0)
            samples = sampler.stop()
        for group in ("g0", "g1"):
            assert values(samples, "replicas", group)[-1] == 1.0
            assert values(samples, "busy", group) and values(samples, "queued_rows", group)
        assert {one.repeat for one in samples} == {1}
        sampler.start(Clock(time.monotonic()), 1)
        until_gone = time.monotonic() + 30
        while list_table(directory).replicas:
            assert time.monotonic() < until_gone
            time.sleep(0.1)
        time.sleep(0.5)
        assert values(sampler.stop(), "replicas", "g0")[-1] == 0.0, "a group whose replicas are all gone has none"
        sampler.close()
        times = [one.at_s for one in samples]
        assert times == sorted(times) and times[0] < 0.5
    assert set(values(sampled(Sampler(run_config(), endpoint)), "directory_up", "directory")) == {0.0}


def test_metrics_pages(metrics_page: str) -> None:
    samples = sampled(Sampler(run_config(metrics=[metrics_page]), NOWHERE))
    label = metrics_page.split("/")[2]
    assert len(values(samples, "engine_running", label)) > 2
    assert set(values(samples, "engine_running", label)) == {7.0}
    assert set(values(samples, "engine_generated_tokens", label)) == {1234.0}
    assert {one.name for one in samples} == {"metrics_up", "engine_running", "engine_generated_tokens"}


def test_the_targets_own_page_is_found(metrics_page: str) -> None:
    endpoint = Endpoint(metrics_page.removesuffix("/metrics") + "/v1", None, None, None)
    assert set(values(sampled(Sampler(run_config(), endpoint)), "engine_running", metrics_page.split("/")[2])) == {7.0}


def test_pages_that_cannot_be_read_are_refused(metrics_page: str) -> None:
    address = metrics_page.removesuffix("/metrics")
    with pytest.raises(ConfigError, match=r"sampling\.metrics\.1: http://127.0.0.1:1/metrics: .*refused"):
        Sampler(run_config(metrics=[metrics_page, "http://127.0.0.1:1/metrics"]), NOWHERE)
    with pytest.raises(ConfigError, match=r"sampling\.metrics\.0: nonsense: .*protocol"):
        Sampler(run_config(metrics=["nonsense"]), NOWHERE)
    missing = Endpoint(f"{address.rpartition(':')[0]}:1/v1", None, None, None)
    assert sampled(Sampler(run_config(), missing)) == []


@pytest.mark.cluster
def test_rays_pages_hold_the_engines_figures(cluster: Cluster) -> None:
    """Under the names of Ray 2.60 and vLLM 0.32; Ray passes them on every few seconds."""
    path = Path(cluster.environment["XDG_STATE_HOME"]) / "expertmesh" / "tests" / "cluster.json"
    pages = ray_pages(Record.model_validate_json(path.read_bytes()))
    done = cluster.run("generate", "--max-tokens", "8", "--temperature", "0", "def f(x):")
    assert done.returncode == 0, done.stderr
    deadline, found = time.monotonic() + 60, {}
    with httpx.Client(timeout=10, trust_env=False) as client:
        while not {"engine_running", "engine_waiting", "engine_kv_cache", "engine_generated_tokens"} <= found.keys():
            assert time.monotonic() < deadline, found
            time.sleep(0.5)
            for address in pages:
                found |= read_page(client, f"http://{address}/metrics")
    assert found["engine_generated_tokens"] > 0 and found["engine_prompt_tokens"] > 0


@pytest.mark.cluster
def test_rows_of_each_expert_of_a_running_cluster(cluster: Cluster) -> None:
    path = Path(cluster.environment["XDG_STATE_HOME"]) / "expertmesh" / "tests" / "cluster.json"
    record = Record.model_validate_json(path.read_bytes())
    sampler = Sampler(run_config(), Endpoint(f"{record.http}/v1", record.model, record.directory, record))
    try:
        before = sampler.expert_rows()
        done = cluster.run("generate", "--max-tokens", "8", "--temperature", "0", "def f(x):")
        assert done.returncode == 0, done.stderr
        after = sampler.expert_rows()
    finally:
        sampler.close()
    assert {layer for layer, _ in after} == {0, 1, 2, 3} and {expert for _, expert in after} == set(range(16))
    rows = {layer: sum(after[key] - before[key] for key in after if key[0] == layer) for layer in range(4)}
    assert len(set(rows.values())) == 1 and rows[0] > 0, rows
