"""A server that answers as Kubernetes' API does about one RayService, its pods and what they log.

Without kubelets no pod runs on a real API server, and none logs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

from kuberay_stand_in import CLUSTER, NAME, ray_service_body
from serve_configs import serve_text

NAMESPACE = "test"
RAY_SERVICES = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayservices"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


def pod(name: str, pool: str, *, ready: bool = True, going: bool = False, **labels: str) -> dict[str, Any]:
    """As KubeRay labels it; the head has no pool."""
    kind = {"ray.io/node-type": "head"} if pool == "" else {"ray.io/node-type": "worker", "ray.io/group": pool}
    gone = {"deletionTimestamp": "2026-01-01T00:00:00Z"} if going else {}
    return {
        "metadata": {"name": name, "labels": {"ray.io/cluster": CLUSTER, **kind, **labels}, **gone},
        "spec": {"nodeName": "node-1", "containers": [{"name": one, "image": "i"} for one in ("ray", "sidecar")]},
        "status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "containerStatuses": [
                {"name": one, "restartCount": 1, "ready": ready, "image": "i", "imageID": "i"}
                for one in ("ray", "sidecar")
            ],
        },
    }


class PodsApi:
    """Pods and logs of one namespace, where one RayService runs."""

    def __init__(self) -> None:
        self.pods: list[dict[str, Any]] = []
        self.logs: dict[str, str] = {}
        self.ended = threading.Event()
        """Set: a log that is followed ends."""
        self.asked: list[tuple[str, dict[str, list[str]]]] = []

    def answer(self, path: str) -> tuple[int, str]:
        parsed = urlparse(path)
        query = parse_qs(parsed.query)
        self.asked.append((parsed.path, query))
        if parsed.path == RAY_SERVICES:
            return 200, json.dumps({"kind": "RayServiceList", "items": [ray_service()]})
        if parsed.path == f"{RAY_SERVICES}/{NAME}":
            return 200, json.dumps(ray_service())
        if parsed.path == PODS:
            return 200, json.dumps({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": self.pods})
        name = parsed.path.split("/")[-2]
        if name in self.logs:
            (tail,) = query.get("tailLines", ["1000000"])
            lines = self.logs[name].splitlines(keepends=True)
            return 200, "".join(lines[max(0, len(lines) - int(tail)) :])
        return 403, json.dumps({"kind": "Status", "code": 403, "message": f"pods {name} is forbidden [x]"})

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Its URL."""
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                code, text = api.answer(self.path)
                self.send_response(code)
                self.send_header("Content-Type", "application/json" if text.startswith("{") else "text/plain")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.chunk(text)
                if "follow=true" in self.path:
                    api.ended.wait(60)
                self.wfile.write(b"0\r\n\r\n")

            def chunk(self, text: str) -> None:
                if text:
                    self.wfile.write(f"{len(text.encode()):x}\r\n{text}\r\n".encode())
                    self.wfile.flush()

            def log_message(self, format: str, *args: Any) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            self.ended.set()
            server.shutdown()
            server.server_close()
            thread.join()


def ray_service() -> dict[str, Any]:
    """As the API server stores it, with what the operator reports."""
    body = ray_service_body(NAME, serve_text())
    stored = {"namespace": NAMESPACE, "resourceVersion": "1", "generation": 1}
    status = {"observedGeneration": 1, "activeServiceStatus": {"rayClusterName": CLUSTER}}
    return body | {"metadata": body["metadata"] | stored, "status": status}
