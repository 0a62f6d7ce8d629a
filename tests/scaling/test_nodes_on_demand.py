"""Ray starts nodes for replicas that have no room, with its fake multi-node autoscaler: a hot group's new replica lands
on one, and fractions of logical GPUs are scheduled as configured."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from elastic_ray import elastic_ray
from mesh import running_dispatcher

from expertmesh.args import ROUTER_APPLICATION
from expertmesh.artifact.manifest import read_manifest
from expertmesh.cluster.local_ray import free_ports
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.config import ClusterConfig
from expertmesh.deployment import directory_address, serve_config
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError
from expertmesh.v1 import directory_pb2
from expertmesh.v1 import expert_pb2 as pb
from router_service.dispatcher import Dispatcher

PATIENCE_S = 120.0
SLOW = {"teraflops": 1.0, "memory_gb_per_s": 100.0, "overhead_us": 50_000}
HOT = {"name": "hot", "experts": "0-15", "num_cpus": 1, "max_replicas": 2, "emulated": SLOW}
HALVES = {"name": "halves", "experts": "0-3", "num_cpus": 0.1, "num_gpus": 0.5, "min_replicas": 3, "max_replicas": 3}


def deploy(api: ServeApi, config: ClusterConfig, artifact: Path) -> None:
    """Without a router; with one proxy, since all nodes share one address; GPUs are logical, so replicas compute on the
    CPU."""
    made = serve_config(config, read_manifest(artifact)) | {"proxy_location": "HeadOnly"}
    made["applications"] = [one for one in made["applications"] if one["name"] != ROUTER_APPLICATION]
    for application in made["applications"]:
        if "device" in application["args"]:
            application["args"]["device"] = "cpu"
    api.deploy(made)


def ready(directory: str, group: str, count: int) -> list[directory_pb2.Replica]:
    deadline, found = time.monotonic() + PATIENCE_S, list[directory_pb2.Replica]()
    while time.monotonic() < deadline:
        with suppress(ClusterError):
            table = list_table(directory, 5.0)
            found = [one for one in table.replicas if one.group == group and one.state == pb.REPLICA_STATE_READY]
            if len(found) == count:
                return found
        time.sleep(0.2)
    raise AssertionError(f"group {group}: {len(found)} of {count} replicas within {PATIENCE_S:.0f} s")


@contextmanager
def load(dispatcher: Dispatcher, layer: int, hidden_size: int, dtype: torch.dtype) -> Iterator[None]:
    """More than one slow replica can do, until the block ends; raises what a dispatch raised."""
    over, failures = threading.Event(), list[Exception]()

    def ask() -> None:
        rows, ids, weights = torch.ones(1, hidden_size).to(dtype), torch.tensor([[0, 1]]), torch.full((1, 2), 0.5)
        try:
            while not over.is_set():
                dispatcher.finish(dispatcher.start(layer, rows, ids.int(), weights))
        except Exception as error:  # noqa: BLE001 raised on the thread of the test
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert failures == []


def test_a_hot_group_gets_a_node_and_halves_of_a_gpu_share_one(demo_artifact: Path, tmp_path: Path) -> None:
    manifest = read_manifest(demo_artifact)
    http_port, grpc_port = free_ports(2)
    described: dict[str, Any] = {
        "model": {"artifact": str(demo_artifact)},
        "server": {"http_port": http_port, "grpc_port": grpc_port},
        "scaling": {"up_after_s": 1, "down_after_s": 600},
    }
    with elastic_ray({"CPU": 1}, {"CPU": 2, "GPU": 1}, most_workers=3, folder=tmp_path) as ray:
        api = ServeApi(ray.dashboard, ray.token)
        config = ClusterConfig.model_validate(described | {"groups": [HOT]})
        directory = directory_address(config)
        deploy(api, config, demo_artifact)
        (first,) = ready(directory, "hot", 1)
        assert len(api.nodes()) == 1

        layer = next(iter(manifest.layers))
        with (
            running_dispatcher(demo_artifact, directory) as dispatcher,
            load(dispatcher, layer, manifest.hidden_size, manifest.torch_dtype),
        ):
            both = ready(directory, "hot", 2)
            (second,) = [one for one in both if one.replica_id != first.replica_id]
            assert second.node_id != first.node_id
            assert len(api.nodes()) == 2, "Ray started a node for it"
            deadline = time.monotonic() + PATIENCE_S
            while not dispatcher.replicas.snapshot()[second.replica_id].rows_sent:
                assert time.monotonic() < deadline
                dispatcher.replicas.snapshot()[second.replica_id].refresh()
                time.sleep(0.1)

        deploy(api, ClusterConfig.model_validate(described | {"groups": [HOT, HALVES]}), demo_artifact)
        halves = Counter(one.node_id for one in ready(directory, "halves", 3))
        assert sorted(halves.values()) == [1, 2], "two on the one GPU of a node, the third on another's"
        assert first.node_id not in halves, "the head has no GPU"
        assert len(api.nodes()) == 3
        assert {one.node_id for one in ready(directory, "hot", 2)} == {first.node_id, second.node_id}
