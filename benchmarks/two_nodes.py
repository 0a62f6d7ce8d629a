"""A Ray of two nodes on this machine, a head and a worker, which may be on a host of its own. Used by `restart_gcs`,
where the head has no CPUs and its GCS a storage, and by `partition_host`; written against Ray 2.60.

`python -m benchmarks.two_nodes PARAMETERS` is the worker: `ray start` allows no second node on loopback.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.host import Host
from expertmesh.cluster import launch, local_ray, processes
from expertmesh.cluster.record import Record
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.config import ClusterConfig
from expertmesh.deployment import directory_address, model_name
from expertmesh.errors import ClusterError

ROOT = Path(__file__).parents[1]
START_S, GRACE_S = 120.0, 10.0
GCS = "gcs_server"
NODE, WORKER = "EXPERTMESH_BENCH_NODE", "worker"
"""In the environment of the worker's processes, which the head's lack; WORKER is also a Ray resource of the worker."""
HEAD_RESOURCE = "node:__internal_head__"
"""Ray's own."""
SERVING = ("ray::ServeReplica", "ray::ProxyActor", "VLLM::")
"""How the titles of Ray Serve's and vLLM's processes begin."""
WAIT_FOR_GCS_S = 600
"""How long a worker goes on without the GCS: KubeRay's value where the GCS has a storage; Ray's own is 60."""
HEADS_OWN = ("RAY_gcs_storage", "RAY_gcs_storage_path", "RAY_REDIS_ADDRESS", *local_ray.PORT_VARIABLES)
WORKER_PORTS = (
    "dashboard_agent_listen_port",
    "metrics_agent_port",
    "metrics_export_port",
    "runtime_env_agent_port",
)


@dataclass(frozen=True)
class Worker:
    """What its command needs, so that it can be started again."""

    num_cpus: int
    ports: tuple[int, int]
    """Of its proxies of Ray Serve: HTTP and gRPC."""
    folder: Path
    log: Path
    resources: Mapping[str, float]
    host: Host | None = None


@dataclass
class TwoNodes:
    head: local_ray.LocalRay
    environment: Mapping[str, str]
    """Of the head."""
    worker: Worker

    def record(self, plan: launch.Plan) -> Record:
        """The cluster that the plan becomes here."""
        server = plan.config.server
        return Record(
            name=plan.config.name,
            config=str(plan.path),
            dashboard=self.head.dashboard,
            http=f"http://{server.host}:{server.http_port}",
            directory=directory_address(plan.config),
            model=model_name(plan.config, plan.manifest),
            marker=self.head.marker,
            token=self.head.token,
        )

    @property
    def command(self) -> list[str]:
        """That started the head."""
        return self.head.command

    @property
    def gcs(self) -> str:
        """host:port."""
        return self.head.gcs

    @property
    def api(self) -> ServeApi:
        return ServeApi(self.head.dashboard, self.head.token)

    def running(self, *, worker: bool) -> list[psutil.Process]:
        return [one for one in processes.running(self.head.marker) if _is_workers(one) == worker]

    def serving(self) -> set[psutil.Process]:
        """The worker's replicas, engines and proxies."""
        return {one for one in self.running(worker=True) if _title(one).startswith(SERVING)}

    def kill_gcs(self) -> None:
        """SIGKILL to the GCS alone; returns when all of the head has followed it."""
        for process in self.running(worker=False):
            if process.name() == GCS:
                process.kill()
        self.wait(lambda: self.head.process.poll() is not None and not self.running(worker=False), "ended with its GCS")

    def start_head(self) -> None:
        """The same command again: the same ports, the same storage, and nothing else of what it left."""
        shutil.rmtree(self.head.temp_dir)
        self.head.temp_dir.mkdir()
        with self.head.log.open("ab") as output:
            process = local_ray.spawn(self.command, self.environment, output, self.head.temp_dir)
        self.head = replace(self.head, process=process)

    def start_worker(self) -> None:
        """With nothing of what one before it left."""
        worker, folder = self.worker, self.worker.folder
        shutil.rmtree(folder)
        folder.mkdir()
        parameters: dict[str, Any] = dict(zip(WORKER_PORTS, local_ray.free_ports(len(WORKER_PORTS)), strict=True))
        address = worker.host.address if worker.host is not None else local_ray.HOST
        parameters |= {"gcs_address": self.gcs, "node_ip_address": address}
        parameters |= {
            "num_cpus": worker.num_cpus,
            "resources": {WORKER: 1000, **worker.resources},
            "object_store_memory": local_ray.OBJECT_STORE_BYTES,
        }
        parameters |= {"temp_dir": str(folder), "min_worker_port": 0, "max_worker_port": 0, "node_manager_port": 0}
        variables = {
            NODE: WORKER,
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(WAIT_FOR_GCS_S),
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(worker.ports[0]),
            "RAY_SERVE_WORKER_PROXY_GRPC_PORT": str(worker.ports[1]),
        }
        inherited = {key: value for key, value in self.environment.items() if key not in HEADS_OWN}
        command = [sys.executable, "-m", "benchmarks.two_nodes", json.dumps(parameters)]
        if worker.host is not None:
            command = worker.host.command(command)
        with worker.log.open("wb") as output:
            local_ray.spawn(command, inherited | variables, output, ROOT)
        self.wait(self.has_worker, "seen its worker")

    def has_worker(self) -> bool:
        """By what the head knows."""
        return any(WORKER in node for node in self.api.nodes())

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Raises ClusterError where the head has not done so."""
        deadline = time.monotonic() + START_S
        while not done():
            if time.monotonic() > deadline:
                raise ClusterError(f"the head has not {what} after {START_S:.0f} s (log: {self.head.log})")
            time.sleep(0.1)


@contextmanager
def two_nodes(
    storage: Mapping[str, str],
    num_cpus: int,
    ports: tuple[int, int],
    logs: Path,
    *,
    head_cpus: int = 0,
    resources: Mapping[str, float] | None = None,
    host: Host | None = None,
) -> Iterator[TwoNodes]:
    """Both ready, with `storage` in the head's environment; the worker has `num_cpus` CPUs, and its proxies of Ray
    Serve listen at `ports`, HTTP and gRPC, whatever those of the head do. Each node has the custom `resources`. The
    worker is on `host`, by default beside the head. All ends with the block."""
    resources = dict(resources or {})
    address = host.here if host is not None else local_ray.HOST
    head = local_ray.start(head_cpus, logs / "head.log", resources, storage, address)
    worker = Worker(num_cpus, ports, Path(tempfile.mkdtemp(prefix="em-")), logs / "worker.log", resources, host)
    try:
        nodes = TwoNodes(head, psutil.Process(head.process.pid).environ(), worker)
        local_ray.wait_until_up(head, START_S, lambda: None)
        nodes.start_worker()
        yield nodes
    finally:
        processes.end(head.marker, GRACE_S)
        for one in (worker.folder, head.temp_dir):
            shutil.rmtree(one, ignore_errors=True)


def with_directory_at(config: ClusterConfig, resources: Mapping[str, float]) -> ClusterConfig:
    """The same, with the directory where these resources are."""
    section = config.directory.model_copy(update={"resources": dict(resources)})
    return config.model_copy(update={"directory": section})


def _is_workers(process: psutil.Process) -> bool:
    try:
        return bool(process.environ().get(NODE) == WORKER)
    except psutil.Error:
        return False  # has just ended


def _title(process: psutil.Process) -> str:
    try:
        return str((process.cmdline() or [""])[0])
    except psutil.Error:
        return ""


def main() -> None:
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    node = Node(RayParams(**json.loads(sys.argv[1])), head=False, shutdown_at_exit=True, spawn_reaper=False)
    while not node.dead_processes():
        time.sleep(1)


if __name__ == "__main__":
    main()
