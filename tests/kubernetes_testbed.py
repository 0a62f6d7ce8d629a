"""A real Kubernetes API server with KubeRay's CRDs, one per session, for the tests of client and chart.

A test folder imports them into its conftest: `from kubernetes_testbed import api_server, namespace`. All folders
share one server.
"""

from __future__ import annotations

import functools
import os
import secrets
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SHARED = CHECKOUT.parent / "shared"
CRDS = SHARED / "crds"
TOOLS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertmesh/kubernetes"
START_ATTEMPTS = 3
REQUIRED = "EXPERTMESH_REQUIRE_TESTBED"
"""Set by `make e2e-kubernetes`: nothing is skipped for want of the API server or its tools."""


@dataclass(frozen=True)
class ApiServer:
    folder: Path
    """The server's logs, certificates and keys."""
    url: str

    @property
    def kubeconfig(self) -> Path:
        """Contexts `admin`, which may do all, and `viewer`, which may do nothing yet."""
        return self.folder / "kubeconfig"

    @property
    def ca(self) -> Path:
        """What proves the server's certificate."""
        return self.folder / "certs/apiserver.crt"

    @property
    def environment(self) -> dict[str, str]:
        """For helm, kubectl and `expertmesh kubernetes`; helm's own files stay in the server's folder."""
        helm = {f"HELM_{kind}_HOME": str(self.folder / "helm" / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
        return os.environ | helm | {"KUBECONFIG": str(self.kubeconfig)}

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Its stdout; fails the test with its stderr."""
        return self._run("kubectl", *arguments, stdin=stdin)

    def helm(self, *arguments: str, stdin: str | None = None) -> str:
        """Its stdout; fails the test with its stderr."""
        return self._run("helm", *arguments, stdin=stdin)

    def _run(self, program: str, *arguments: str, stdin: str | None) -> str:
        done = subprocess.run(
            [tool(program), *arguments],
            check=False,
            input=stdin or "",
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=120,
        )
        assert done.returncode == 0, f"{program} {' '.join(arguments)}: {done.stderr}"
        return done.stdout


def absent(reason: str) -> NoReturn:
    """Skips the test, or ends all of them where a real API server was promised."""
    if os.environ.get(REQUIRED):
        pytest.exit(reason, returncode=1)
    pytest.skip(reason)


def tool(program: str) -> Path:
    """helm, kubectl, promtool or hadolint; `absent` where `tools/kubernetes-tools` has not been run."""
    path = TOOLS / "bin" / program
    if not path.exists():
        absent(f"{program} is not in {TOOLS}/bin; tools/kubernetes-tools puts it there")
    return path


@pytest.fixture(scope="session")
def api_server() -> Iterator[ApiServer]:
    """`absent` where ../shared is not beside the checkout, or `tools/kubernetes-tools` has not been run."""
    running, stop = _running()
    yield running
    stop()


@pytest.fixture
def namespace(api_server: ApiServer) -> str:
    """A new one, empty."""
    name = f"test-{secrets.token_hex(4)}"
    api_server.kubectl("create", "namespace", name)
    return name


@functools.cache
def _running() -> tuple[ApiServer, functools.partial[None]]:
    """The session's server, and what ends it; both folders' fixtures get the same."""
    if not CRDS.is_dir():
        absent("../shared, with the API server's build script and KubeRay's CRDs, is not beside the checkout")
    if not (TOOLS / "apiserver/bin/kube-apiserver").exists():
        absent(f"no API server in {TOOLS}/apiserver; tools/kubernetes-tools builds it")
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="expertmesh-kubernetes-")))
        work = folder / "server"
        undo.callback(subprocess.run, [SHARED / "k8s-testbed/stop", work], check=False)
        server = ApiServer(work, f"https://127.0.0.1:{_start(work)}")
        crds = [f"--filename={path}" for path in sorted(CRDS.glob("*.yaml"))]
        server.kubectl("create", "--validate=false", *crds)
        # a CRD has no conditions at first, which `--for=condition` takes for an error
        server.kubectl("wait", "--for=jsonpath={.status.acceptedNames.kind}", "--timeout=60s", "crd", "--all")
        server.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
        return server, functools.partial(undo.pop_all().close)
    raise AssertionError("unreachable")


def _start(work: Path) -> int:
    """The port."""
    said = ""
    for _attempt in range(START_ATTEMPTS):
        port = _free_port()
        command = [SHARED / "k8s-testbed/start", TOOLS / "apiserver/bin", work, str(port)]
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True
        )
        if done.returncode == 0:
            return port
        subprocess.run([SHARED / "k8s-testbed/stop", work], check=False)
        said = done.stderr
    raise AssertionError(f"the API server did not start:\n{said}")


def _free_port() -> int:
    """One of which the ports 1000 and 1001 above, for etcd, are free too; below those that systems hand out."""
    while True:
        port = 16384 + secrets.randbelow(12000)
        try:
            for offset in (0, 1000, 1001):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + offset))
        except OSError:
            continue
        return port
