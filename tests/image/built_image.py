"""The built image, run by runc as Kubernetes would: as its user, no capabilities, a read-only root, /tmp writable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAG = os.environ.get("IMAGE_TAG", "expertmesh:cpu")
RUNTIME = "runc"
HOSTNAME = "expertmesh-image"
STORAGE = os.environ.get("IMAGE_STORAGE")


def buildah(*arguments: str) -> str:
    storage = ["--root", f"{STORAGE}/root", "--runroot", f"{STORAGE}/run"] if STORAGE else []
    done = subprocess.run(["buildah", *storage, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@dataclass(frozen=True)
class Image:
    root: Path
    """Its files, mounted here."""
    config: dict[str, Any]
    """Of the image, as OCI has it: Env, Cmd, User, Labels, ..."""

    def run(
        self, *command: str, mounts: Mapping[str, Path] | None = None, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        with self.start(*command, mounts=mounts, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            out, err = process.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    @contextmanager
    def start(
        self, *command: str, mounts: Mapping[str, Path] | None = None, **streams: Any
    ) -> Iterator[subprocess.Popen[str]]:
        """A container that ends with the context; `mounts` are read-only: path in it -> path here."""
        with tempfile.TemporaryDirectory(prefix="em-image-") as bundle:
            hosts = Path(bundle) / "hosts"  # kubelet and docker mount one too
            hosts.write_text(f"127.0.0.1 localhost {HOSTNAME}\n")
            specification = self._specification(command, {**(mounts or {}), "/etc/hosts": hosts})
            (Path(bundle) / "config.json").write_text(json.dumps(specification))
            run = [RUNTIME, "--root", f"{bundle}/state", "run", "--bundle", bundle, f"em-{uuid.uuid4().hex}"]
            process = subprocess.Popen(run, text=True, stdin=subprocess.DEVNULL, **streams)
            try:
                yield process
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _specification(self, command: Sequence[str], mounts: Mapping[str, Path]) -> dict[str, Any]:
        """Shares the host's network, so that a port on its loopback can be asked."""
        uid, gid = map(int, self.config["User"].split(":"))
        ours = [{"destination": to, "source": str(path), "options": ["rbind", "ro"]} for to, path in mounts.items()]
        return {
            "ociVersion": "1.0.2",
            "hostname": HOSTNAME,
            "process": {
                "user": {"uid": uid, "gid": gid},
                "args": [*command],
                "env": [*self.config["Env"], "OMP_NUM_THREADS=1", "HOME=/home/expertmesh"],
                "cwd": self.config["WorkingDir"],
                "noNewPrivileges": True,
                "capabilities": {},
            },
            "root": {"path": str(self.root), "readonly": True},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", "ro"]},  # vLLM's lscpu
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "mode=1777"]},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=1777"]},
                *ours,
            ],
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]},
        }


@contextmanager
def mounted() -> Iterator[Image]:
    container = buildah("from", "--pull-never", TAG)
    try:
        config = json.loads(buildah("inspect", "--type", "image", TAG))["OCIv1"]["config"]
        yield Image(Path(buildah("mount", container)), config)
    finally:
        buildah("rm", container)
