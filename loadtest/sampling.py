"""What the servers say of themselves while a run goes on: groups by the directory, engines by their metrics pages."""

from __future__ import annotations

import json
import math
import re
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from expertmesh.cluster.record import Record
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError, ConfigError
from expertmesh.v1 import directory_pb2
from expertmesh.v1 import expert_pb2 as pb
from loadtest.config import RunConfig
from loadtest.endpoint import Endpoint
from loadtest.expert_rows import ExpertRowsReader, Rows
from loadtest.records import Sample
from loadtest.target import Clock

METRICS = {
    "num_requests_running": "engine_running",
    "num_requests_waiting": "engine_waiting",
    "kv_cache_usage_perc": "engine_kv_cache",
    "gpu_cache_usage_perc": "engine_kv_cache",
    "num_preemptions": "engine_preemptions",
    "generation_tokens": "engine_generated_tokens",
    "prompt_tokens": "engine_prompt_tokens",
}
"""vLLM's family of metrics -> name of the series; values are summed over labels."""
PREFIX = re.compile(r"(ray_)?vllm[:_]")
"""vLLM's own page has `vllm:`, Ray's, which it reports to under Ray Serve LLM, `ray_vllm_`."""
KNOWN_LINE = re.compile(rf"(# (HELP|TYPE) )?{PREFIX.pattern}({'|'.join(METRICS)})(_total)?[ {{]")
RAY_TARGETS = "prom_metrics_service_discovery.json"
RAY_EVERY_S = 10.0
"""A node's page is large, takes Ray 0.2 s to make and changes every 10 s or so."""
TIMEOUT_S = 2.0


@dataclass
class Page:
    """A metrics page, read again `every_s` after the last time."""

    url: str
    every_s: float
    due_s: float = -math.inf


class Sampler:
    """Asks from a thread, every `sampling.every_s`. A server that does not answer leaves a gap, and
    `directory_up` or `metrics_up` is 0."""

    def __init__(self, config: RunConfig, endpoint: Endpoint) -> None:
        """Raises ConfigError where a metrics page that the run names cannot be read."""
        self._every_s = config.sampling.every_s
        self._directory, self._tls = endpoint.directory, endpoint.tls
        self._groups_seen: set[str] = set()
        self._http = httpx.Client(timeout=TIMEOUT_S, trust_env=False)
        self._pages = [Page(url, self._every_s) for url in config.sampling.metrics]
        for number, page in enumerate(self._pages):
            try:
                read_page(self._http, page.url)
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                raise ConfigError(f"sampling.metrics.{number}: {page.url}: {_reason(error)}") from None
        if endpoint.http is not None:
            self._add_page(endpoint.http.removesuffix("/v1") + "/metrics", self._every_s)
        if endpoint.cluster is not None:
            for address in ray_pages(endpoint.cluster):
                self._add_page(f"http://{address}/metrics", max(self._every_s, RAY_EVERY_S))
        cluster = endpoint.cluster
        self._reader = ExpertRowsReader(cluster.directory, cluster.tls) if cluster is not None else None

    def start(self, clock: Clock, repeat: int) -> None:
        self._samples: list[Sample] = []
        for page in self._pages:
            page.due_s = -math.inf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(clock, repeat), name="loadtest-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> list[Sample]:
        self._stop.set()
        self._thread.join()
        return self._samples

    def expert_rows(self) -> Rows:
        """Rows of each expert so far, of a cluster that runs on this machine; empty elsewhere. Takes some seconds."""
        return self._reader.read() if self._reader is not None else {}

    def close(self) -> None:
        self._http.close()

    def _add_page(self, url: str, every_s: float) -> None:
        """If there is such a page, and it says something of an engine."""
        try:
            found = read_page(self._http, url)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            return
        if found:
            self._pages.append(Page(url, every_s))

    def _run(self, clock: Clock, repeat: int) -> None:
        due_s = max(0.0, clock.now())
        while not self._stop.wait(max(0.0, due_s - clock.now())):
            due_s = max(due_s + self._every_s, clock.now())
            self._samples += [
                Sample(repeat, clock.now(), name, label, value)
                for name, label, value in (*self._groups(), *self._scrape(clock.now()))
            ]

    def _groups(self) -> list[tuple[str, str, float]]:
        if self._directory is None:
            return []
        try:
            table = list_table(self._directory, timeout_s=TIMEOUT_S, tls=self._tls)
        except ClusterError:
            return [("directory_up", "directory", 0.0)]
        self._groups_seen |= {replica.group for replica in table.replicas}
        return [("directory_up", "directory", 1.0), *group_figures(table.replicas, self._groups_seen)]

    def _scrape(self, now_s: float) -> list[tuple[str, str, float]]:
        found = []
        for page in self._pages:
            if now_s < page.due_s:
                continue
            page.due_s = now_s + page.every_s - self._every_s / 2
            label = httpx.URL(page.url).netloc.decode()
            try:
                series = read_page(self._http, page.url)
            except (httpx.HTTPError, ValueError):
                found.append(("metrics_up", label, 0.0))
                continue
            found += [("metrics_up", label, 1.0), *((name, label, value) for name, value in series.items())]
        return found


def ray_pages(cluster: Record) -> list[str]:
    """host:port of the metrics pages of a cluster's Ray, where that runs on this machine. As of Ray 2.60."""
    if cluster.temp_dir is None:
        return []
    try:
        listed = json.loads((Path(cluster.temp_dir) / RAY_TARGETS).read_bytes())
    except (OSError, ValueError):
        return []
    return [str(target) for entry in listed for target in entry["targets"]]


def group_figures(
    replicas: Iterable[directory_pb2.Replica], groups_seen: Iterable[str] = ()
) -> list[tuple[str, str, float]]:
    """(name, group, value): `replicas` that are ready, `queued_rows` and `rows_per_s` over them all, mean `busy`;
    zeros for a group seen before that has no replica now."""
    groups: dict[str, list[directory_pb2.Replica]] = {group: [] for group in groups_seen}
    for replica in replicas:
        groups.setdefault(replica.group, []).append(replica)
    found: list[tuple[str, str, float]] = []
    for group, members in sorted(groups.items()):
        loads = [replica.load for replica in members]
        ready = sum(replica.state == pb.REPLICA_STATE_READY for replica in members)
        found += [
            ("replicas", group, float(ready)),
            ("queued_rows", group, float(sum(load.queued_rows for load in loads))),
            ("rows_per_s", group, sum(load.rows_per_s for load in loads)),
            ("busy", group, sum(load.busy for load in loads) / max(1, len(loads))),
        ]
    return found


def read_page(client: httpx.Client, url: str) -> dict[str, float]:
    """Series of a metrics page that we know, summed over labels. Raises httpx.HTTPError where it does not answer and
    ValueError where it is no such page."""
    answer = client.get(url)
    answer.raise_for_status()
    lines = (line for line in answer.text.splitlines() if KNOWN_LINE.match(line))
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        name = METRICS[PREFIX.sub("", family.name).removesuffix("_total")]
        found[name] += sum(sample.value for sample in family.samples)
    return dict(found)


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return str(error).partition("\n")[0] or type(error).__name__
