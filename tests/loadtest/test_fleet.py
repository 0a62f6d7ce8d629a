"""Client processes wherever they run: one that dies is told of, and Ray's actors do the same work."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from stub import config_for, execute_quietly, poisson, run_command, stub_server

from expertmesh.errors import ClusterError


def kill_the_first_child() -> None:
    """Once there is one that has been at work for a moment."""
    while True:
        workers = [
            child for child in psutil.Process().children() if any("spawn_main" in word for word in child.cmdline())
        ]
        if workers:
            time.sleep(2)
            return os.kill(workers[0].pid, signal.SIGKILL)
        time.sleep(0.05)


def test_a_client_process_that_dies_ends_the_run_with_one_line() -> None:
    with stub_server() as stub:
        threading.Thread(target=kill_the_first_child, daemon=True).start()
        with pytest.raises(ClusterError, match=r"^client process 0: it died"):
            execute_quietly(config_for(stub.url, poisson(5, 60)))


def test_client_processes_as_actors_of_ray(tmp_path: Path) -> None:
    with stub_server("--ttft", "0.05", "--itl", "0.01") as stub:
        flags = ["--rate", "20", "--duration", "3", "--output-tokens", "4", "--processes", "2", "--ray", "local"]
        done = run_command("--url", stub.url, *flags, "--out", str(tmp_path / "out"), "--json")
        assert done.returncode in {0, 3}, done.stderr
        summary = json.loads(done.stdout)
        sent = [name for name in stub.log() if name.startswith("loadtest-0-") and len(name) < 20]
    assert summary["requests"]["by_status"] == {"ok": len(sent)}
    assert summary["client"]["processes"] == 2
    assert len(sent) > 30


def test_a_ray_that_is_not_there(tmp_path: Path) -> None:
    with stub_server() as stub:
        done = run_command("--url", stub.url, "--rate", "5", "--ray", "127.0.0.1:1", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr == "expertmesh: Ray at 127.0.0.1:1: [errno 111] connection refused\n"
