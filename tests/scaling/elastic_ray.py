"""A Ray head on loopback whose autoscaler starts nodes here, as Ray's own tests do. Written against Ray 2.60.

`ray.cluster_utils.AutoscalingCluster` would end every Ray on the machine before and after.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expertmesh.cluster import local_ray, processes
from expertmesh.cluster.local_ray import HOST, PORT_OPTIONS, LocalRay, free_ports
from expertmesh.cluster.processes import MARKER

START_S, GRACE_S = 90.0, 15.0
LAUNCHER_LISTS = (
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@contextmanager
def elastic_ray(
    head: dict[str, float], worker: dict[str, float], most_workers: int, folder: Path
) -> Iterator[LocalRay]:
    """`head` and `worker` are Ray's resources of a node; workers come where something waits for room."""
    options = dict(zip(PORT_OPTIONS, free_ports(len(PORT_OPTIONS)), strict=True))
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(_autoscaling(head, worker, most_workers, f"{HOST}:{options['--port']}")))
    marker, temp_dir = uuid.uuid4().hex, Path(tempfile.mkdtemp(prefix="em-", dir="/tmp"))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"{option}={port}" for option, port in options.items()]
    command += [f"--node-ip-address={HOST}", f"--dashboard-host={HOST}", "--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--num-cpus={head['CPU']:g}", "--object-store-memory=100000000", f"--temp-dir={temp_dir}"]
    command += [f"--autoscaling-config={config}"]
    token = os.environ["RAY_AUTH_TOKEN"]
    ours = {
        MARKER: marker,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    log = folder / "ray.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | ours, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    ray = LocalRay(process, f"http://{HOST}:{options['--dashboard-port']}", token, marker, temp_dir, log)
    try:
        local_ray.wait_until_up(ray, START_S, lambda: None)
        yield ray
    finally:
        processes.end(marker, GRACE_S)


def _autoscaling(head: dict[str, float], worker: dict[str, float], most_workers: int, gcs: str) -> dict[str, Any]:
    object_store = {"object_store_memory": 100_000_000}
    return {
        "cluster_name": "elastic",
        "max_workers": most_workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 30,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs,
            "use_node_id_as_ip": True,  # all nodes have the same address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": head, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": worker | object_store,
                "node_config": {},
                "min_workers": 0,
                "max_workers": most_workers,
            },
        },
        "head_node_type": "ray.head.default",
        # of a cluster launcher, which the autoscaler wants all the same
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **dict.fromkeys(LAUNCHER_LISTS, ()),
    }
