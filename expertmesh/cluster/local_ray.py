"""A Ray head of our own on this machine, on loopback alone and on ports of its own. Written against Ray 2.60."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from expertmesh.cluster.processes import MARKER
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.directory import secure_port
from expertmesh.errors import ClusterError

HOST = "127.0.0.1"
OBJECT_STORE_BYTES = 200 * 2**20
MAX_TEMP_PATH = 40
"""Ray's sockets lie some 65 characters below its folder, and a socket's path may have 107."""
PORT_OPTIONS = (
    "--port",
    "--dashboard-port",
    "--ray-client-server-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--metrics-export-port",
    "--runtime-env-agent-port",
)
DROPPED = ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", secure_port.VARIABLE)
PORT_VARIABLES = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")


@dataclass(frozen=True)
class LocalRay:
    process: subprocess.Popen[bytes]
    dashboard: str
    token: str
    marker: str
    temp_dir: Path
    log: Path

    @property
    def command(self) -> list[str]:
        """That started it."""
        return cast("list[str]", self.process.args)

    @property
    def gcs(self) -> str:
        """host:port."""
        host, port = (
            next(one.removeprefix(name) for one in self.command if one.startswith(name))
            for name in ("--node-ip-address=", "--port=")
        )
        return f"{host}:{port}"


def start(
    num_cpus: int,
    log: Path,
    resources: Mapping[str, float] | None = None,
    variables: Mapping[str, str] | None = None,
    address: str = HOST,
) -> LocalRay:
    """Starts `ray start --head --block`, which writes to `log`; use `wait_until_up` next.

    The node has `num_cpus` CPUs and the custom `resources`, whatever the machine has; all of its processes have
    `variables` in their environment. Other nodes reach it at `address`, its dashboard stays on loopback.
    """
    ports = free_ports(len(PORT_OPTIONS) + len(PORT_VARIABLES))
    options = dict(zip(PORT_OPTIONS, ports, strict=False))
    marker, temp_dir = uuid.uuid4().hex, _temp_dir()
    token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"{option}={port}" for option, port in options.items()]
    command += [f"--node-ip-address={address}", f"--dashboard-host={HOST}"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--num-cpus={num_cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={temp_dir}"]
    if resources:
        command.append(f"--resources={json.dumps(dict(resources))}")
    environment = _environment(marker, token) | dict(zip(PORT_VARIABLES, map(str, ports[len(options) :]), strict=True))
    environment |= variables or {}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = spawn(command, environment, output, temp_dir)
    return LocalRay(process, f"http://{HOST}:{options['--dashboard-port']}", token, marker, temp_dir, log)


def spawn(
    command: Sequence[str], environment: Mapping[str, str], output: IO[bytes], folder: Path
) -> subprocess.Popen[bytes]:
    """A process of its own session that works in `folder`, so that an interrupt here does not reach it."""
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=folder,
        start_new_session=True,
    )


def wait_until_up(ray: LocalRay, timeout_s: float, tick: Callable[[], None]) -> None:
    """Waits for the dashboard and its node; raises ClusterError with the log's last line where they do not come."""
    api = ServeApi(ray.dashboard, ray.token)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if ray.process.poll() is not None:
            raise ClusterError(f"Ray did not start: {last_line(ray.log)} (log: {ray.log})")
        try:
            if api.nodes():
                return
        except ClusterError:
            pass  # not yet
        tick()
        time.sleep(0.25)
    raise ClusterError(f"Ray did not start within {timeout_s:.0f} s: {last_line(ray.log)} (log: {ray.log})")


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def port_is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError:
            return False
    return True


def last_line(log: Path) -> str:
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it wrote nothing")


def _temp_dir() -> Path:
    folder = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="em-", dir=folder if len(folder) <= MAX_TEMP_PATH else "/tmp"))


def _environment(marker: str, token: str) -> dict[str, str]:
    ours = {
        MARKER: marker,
        # other users of this machine can reach loopback too
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        # applications set their own; what Ray itself runs needs no more
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # without it Ray replaces 127.0.0.1 by the host's address and listens on all interfaces
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # `down` has let the applications drain before it ends Ray
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # Ray lowers a worker's priority once it has started: one that starts would take the cores of those that serve
        "RAY_worker_niceness": "0",
        # Serve replaces a proxy that has failed three checks: by default that takes 30 s
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "router_service.early_refusal:middlewares",
    }
    return {key: value for key, value in os.environ.items() if key not in DROPPED} | ours
