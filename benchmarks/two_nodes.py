"""A Ray of two nodes on this machine, as the chart makes one: a head without CPUs, whose GCS keeps Ray's state in a
storage, and a worker on which the replicas run. Used by `restart_gcs`; written against Ray 2.60.

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
from typing import Any, cast

import psutil

from expertmesh.cluster import local_ray, processes
from expertmesh.cluster.serve_api import ServeApi
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


@dataclass
class TwoNodes:
    head: local_ray.LocalRay
    environment: Mapping[str, str]
    """Of the head."""

    @property
    def command(self) -> list[str]:
        """That started the head."""
        return cast("list[str]", self.head.process.args)

    @property
    def gcs(self) -> str:
        """host:port."""
        port = next(one for one in self.command if one.startswith("--port="))
        return f"{local_ray.HOST}:{port.partition('=')[2]}"

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

    def start_worker(self, num_cpus: int, ports: tuple[int, int], folder: Path, log: Path) -> None:
        parameters: dict[str, Any] = dict(zip(WORKER_PORTS, local_ray.free_ports(len(WORKER_PORTS)), strict=True))
        parameters |= {"gcs_address": self.gcs, "node_ip_address": local_ray.HOST}
        parameters |= {
            "num_cpus": num_cpus,
            "resources": {WORKER: 1000},
            "object_store_memory": local_ray.OBJECT_STORE_BYTES,
        }
        parameters |= {"temp_dir": str(folder), "min_worker_port": 0, "max_worker_port": 0, "node_manager_port": 0}
        variables = {
            NODE: WORKER,
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(WAIT_FOR_GCS_S),
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(ports[0]),
            "RAY_SERVE_WORKER_PROXY_GRPC_PORT": str(ports[1]),
        }
        inherited = {key: value for key, value in self.environment.items() if key not in HEADS_OWN}
        command = [sys.executable, "-m", "benchmarks.two_nodes", json.dumps(parameters)]
        with log.open("wb") as output:
            local_ray.spawn(command, inherited | variables, output, ROOT)
        self.wait(lambda: any(node.get("CPU") for node in self.api.nodes()), "seen its worker")

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Raises ClusterError where the head has not done so."""
        deadline = time.monotonic() + START_S
        while not done():
            if time.monotonic() > deadline:
                raise ClusterError(f"the head has not {what} after {START_S:.0f} s (log: {self.head.log})")
            time.sleep(0.1)


@contextmanager
def two_nodes(storage: Mapping[str, str], num_cpus: int, ports: tuple[int, int], logs: Path) -> Iterator[TwoNodes]:
    """Both ready, with `storage` in the head's environment; the worker has `num_cpus` CPUs, and its proxies of Ray
    Serve listen at `ports`, HTTP and gRPC, whatever those of the head do. All ends with the block."""
    head = local_ray.start(0, logs / "head.log", variables=storage)
    folder = Path(tempfile.mkdtemp(prefix="em-"))
    try:
        nodes = TwoNodes(head, psutil.Process(head.process.pid).environ())
        local_ray.wait_until_up(head, START_S, lambda: None)
        nodes.start_worker(num_cpus, ports, folder, logs / "worker.log")
        yield nodes
    finally:
        processes.end(head.marker, GRACE_S)
        for one in (folder, head.temp_dir):
            shutil.rmtree(one, ignore_errors=True)


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
