"""What is in the image and what is not, and that it serves: built by `tools/image`, run by `make image`."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml
from built_image import Image
from session_cluster import DEMO_CHECKPOINT

import expertmesh
from expertmesh import api_key_file

pytestmark = pytest.mark.image

BUILD_TOOLS = (
    "gcc",
    "g++",
    "cc",
    "c++",
    "ld",
    "as",
    "make",
    "cmake",
    "ninja",
    "pip",
    "pip3",
    "git",
    "dpkg-buildpackage",
)
SITE = "opt/expertmesh/lib/python3.11/site-packages"
OPTIONAL_LIBRARIES = {"libtbb.so.12", "libgomp.so.1.0.0"}
"""Of two of numba's thread pools, which it does without."""


def output(image: Image, *command: str) -> str:
    done = image.run(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_its_metadata(image: Image) -> None:
    config = image.config
    assert config["User"] == "1000:1000"
    assert config["StopSignal"] == "SIGTERM"
    assert not config.get("Entrypoint")
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert (labels["title"], labels["licenses"]) == ("expertmesh", "Apache-2.0")
    assert labels["version"] == expertmesh.__version__
    assert labels["base.digest"].startswith("sha256:")


def test_its_user_is_nobody_special(image: Image) -> None:
    assert output(image, "id") == "uid=1000(expertmesh) gid=1000(expertmesh) groups=1000(expertmesh)"
    home = image.root / "home/expertmesh"
    assert (home.stat().st_uid, home.stat().st_gid) == (1000, 1000)
    theirs = [one for one in image.root.rglob("*") if one.lstat().st_uid == 1000 and not one.is_relative_to(home)]
    assert theirs == [], "nothing that it runs can be changed by it"


@pytest.mark.parametrize("shell", ["-c", "-lc"])
def test_what_kuberay_runs_is_there(image: Image, shell: str) -> None:
    """`ray start` in a shell, a login shell where the operator is told so; wget and grep in probes."""
    found = output(image, "/bin/bash", shell, "ulimit -n 65536; ray --version; command -v expertmesh wget grep")
    assert found.splitlines()[0] == "ray, version 2.60.0"
    assert "/opt/expertmesh/bin/expertmesh" in found


def test_no_build_tools_are_left(image: Image) -> None:
    assert image.run("/bin/bash", "-lc", f"command -v {' '.join(BUILD_TOOLS)}").stdout == ""
    packages = output(image, "dpkg-query", "--show", "--showformat=${Package}\\n").split()
    assert [one for one in packages if one.endswith("-dev") or one.startswith(("gcc", "g++", "cpp", "binutils"))] in (
        ["gcc-12-base"],
        [],
    )
    for module in ("pip", "hatchling", "nanobind", "scikit_build_core", "grpc_tools", "pytest", "mypy"):
        assert not (image.root / SITE / module).exists(), module


def test_no_cache_and_no_secret_is_left(image: Image) -> None:
    for path in ("root/.cache", "home/expertmesh/.cache", "var/cache/apt/archives", "var/lib/apt/lists", "run/secrets"):
        left = [one for one in (image.root / path).rglob("*") if one.is_file() and one.name != "lock"]
        assert left == [], path
    for path in ("etc/pip.conf", "root/.config/pip", "root/.pip", "source", "wheels", "build", "mnt/wheels"):
        assert not (image.root / path).exists(), path
    history = json.dumps(image.config)
    assert "pip" not in history.lower() and "index" not in history.lower()


def test_every_library_is_found(image: Image) -> None:
    script = f"find /{SITE} /usr/lib -name '*.so*' -type f -print0 | xargs -0 ldd 2>/dev/null"
    libraries = ":".join(f"/{SITE}/{one}" for one in ("scipy.libs", "torch/lib", "tvm_ffi/lib"))
    lines = image.run("/bin/bash", "-c", f"export LD_LIBRARY_PATH={libraries}; {script}").stdout.splitlines()
    assert any("libgrpc++.so.1.51 => /" in line for line in lines), "of the native core"
    missing = {line.split()[0] for line in lines if "not found" in line}
    assert missing <= OPTIONAL_LIBRARIES


def test_the_native_core_and_the_plugin_load(image: Image) -> None:
    program = (
        "import expertmesh_native, importlib.metadata as m;"
        "print(*[e.load() for e in m.entry_points(group='vllm.general_plugins', name='expertmesh')])"
    )
    assert output(image, "python", "-c", program).startswith("<function register at")


def test_nothing_can_be_written_but_tmp(image: Image) -> None:
    assert image.run("/bin/bash", "-c", "touch ~/x || touch /opt/expertmesh/x || touch /var/tmp/x").returncode != 0
    assert image.run("touch", "/tmp/x").returncode == 0


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_a_ray_node_answers_kuberays_probes(image: Image) -> None:
    """`ray start` as the operator writes it, and its probes, in the container."""
    gcs, dashboard, agent, client, metrics = free_ports(5)
    start = (
        f"ulimit -n 65536; RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 ray start --head --block --node-ip-address=127.0.0.1 "
        f"--port={gcs} --dashboard-host=127.0.0.1 --dashboard-port={dashboard} --dashboard-agent-listen-port={agent} "
        f"--ray-client-server-port={client} --metrics-export-port={metrics} --num-cpus=1 "
        "--object-store-memory=100000000 --disable-usage-stats"
    )
    probe = "wget --tries 1 -T 2 -q -O- http://localhost:{}/{} | grep success"
    probes = f"{probe.format(agent, 'api/local_raylet_healthz')} && {probe.format(dashboard, 'api/gcs_healthz')}"
    wait = f"for _ in $(seq 90); do if {probes}; then exit 0; fi; sleep 1; done; exit 1"
    done = image.run("/bin/bash", "-lc", f"({start}) >/tmp/ray.log 2>&1 & {wait}", timeout_s=240)
    assert done.stdout.split() == ["success", "success"], done.stderr[-2000:]


def test_it_serves_the_demo_model(image: Image, tmp_path: Path) -> None:
    """prepare, up, and completions for those alone who show a key."""
    http_port, grpc_port = free_ports(2)
    _, key = api_key_file.create(tmp_path / "keys.txt", "test")
    (tmp_path / "keys.txt").chmod(0o644)
    described = {
        "name": "image",
        "model": {"artifact": "/tmp/artifact", "name": "demo"},
        "engine": {"max_model_len": 512, "kv_cache_gib": 0.25},
        "groups": [{"name": "a", "experts": "0-7"}, {"name": "b", "experts": "8-15"}],
        "server": {"http_port": http_port, "grpc_port": grpc_port},
        "security": {"api_keys": "keys.txt"},
    }
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(described))
    tmp_path.chmod(0o755)
    log = tmp_path / "log"
    command = "expertmesh prepare /checkpoint /tmp/artifact && exec expertmesh up --wait /config/cluster.yaml"
    mounts = {"/checkpoint": DEMO_CHECKPOINT, "/config": tmp_path}
    with (
        log.open("w") as file,
        image.start("/bin/bash", "-c", command, mounts=mounts, stdout=file, stderr=file) as process,
    ):
        wait_for(process, log, "running; Ctrl-C stops it")
        url = f"http://127.0.0.1:{http_port}/v1/completions"
        body = {"model": "demo", "prompt": "def fibonacci(n):", "max_tokens": 16, "temperature": 0}
        for given in ({}, {"Authorization": f"Bearer {key}x"}, {"Authorization": "Bearer " + "a" * 2**20}):
            refused = httpx.post(url, json=body, headers=given, timeout=120)
            assert 400 <= refused.status_code < 500, refused.text
            assert "choices" not in refused.text
        assert httpx.get(url.replace("completions", "models")).status_code == 401
        assert httpx.get(f"http://127.0.0.1:{http_port}/-/healthz").status_code == 200
        answer = httpx.post(url, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 16
        assert answer.json()["choices"][0]["text"].startswith("\n    ")
    assert "stopping" in log.read_text()
    assert process.returncode != -9


def wait_for(process: subprocess.Popen[str], log: Path, line: str, timeout_s: float = 420) -> None:
    until = time.monotonic() + timeout_s
    while line not in log.read_text():
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
        time.sleep(0.5)
