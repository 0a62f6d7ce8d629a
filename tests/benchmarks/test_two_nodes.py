"""A head whose GCS dies and is started again with its storage, beside a worker: on this `restart_gcs` rests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.restart_gcs import rocksdb
from benchmarks.two_nodes import TwoNodes, two_nodes
from expertmesh.cluster import local_ray

COUNT = """
import os, sys, ray
ray.init(address=sys.argv[1], namespace="test", _node_ip_address="127.0.0.1", log_to_driver=False)

@ray.remote(num_cpus=1)
class Counter:
    count = 0
    def add(self):
        self.count += 1
        return os.getpid(), self.count

counter = Counter.options(name="counter", lifetime="detached", get_if_exists=True).remote()
print(*ray.get(counter.add.remote(), timeout=60))
"""


def test_an_actor_of_the_worker_outlives_the_gcs(tmp_path: Path) -> None:
    http, grpc = local_ray.free_ports(2)
    with rocksdb() as storage, two_nodes(storage, 2, (http, grpc), tmp_path) as nodes:
        pid, count = counted(nodes)
        heads = {one.pid for one in nodes.running(worker=False)}
        nodes.kill_gcs()
        assert pid not in heads
        assert pid in {one.pid for one in nodes.running(worker=True)}
        nodes.start_head()
        local_ray.wait_until_up(nodes.head, 60, lambda: None)
        assert (count, counted(nodes)) == (1, (pid, 2))


def counted(nodes: TwoNodes) -> tuple[int, int]:
    """The actor's process and how often it was called; makes it where there is none."""
    command = [sys.executable, "-c", COUNT, nodes.gcs]
    done = subprocess.run(
        command, env=dict(nodes.environment), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pid, count = map(int, done.stdout.split()[-2:])
    return pid, count
