"""What runs on a real cluster and not here: KubeRay's operator, which reports what Ray Serve does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kubernetes import client
from kubernetes_testbed import ApiServer
from serve_configs import serve_text

from expertmesh.kubernetes.connection import Connection, connect
from expertmesh.kubernetes.ray_services import KIND
from expertmesh.kubernetes.serve_text import read_applications

NAME = "mesh"
CLUSTER = "mesh-abcde"
POLL_S = 0.05


def admin(server: ApiServer, namespace: str) -> Connection:
    return connect(server.kubeconfig, "admin", namespace)


def ray_service_body(name: str, text: str) -> dict[str, Any]:
    """With pools `router` and `experts`, as its owner writes it."""
    containers = [{"name": "ray", "image": "ray"}]
    pods = {"rayStartParams": {}, "template": {"spec": {"containers": containers}}}
    counts = {"replicas": 1, "minReplicas": 1, "maxReplicas": 2}
    workers = [{"groupName": pool, **counts, **pods} for pool in ("router", "experts")]
    spec = {"serveConfigV2": text, "rayClusterConfig": {"headGroupSpec": pods, "workerGroupSpecs": workers}}
    return {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": name}, "spec": spec}


class RayServiceObject:
    """One RayService on the API server, written as its owner, as others and as its operator would."""

    def __init__(self, connection: Connection, name: str = NAME) -> None:
        self.connection = connection
        self.name = name
        self._api = client.CustomObjectsApi(connection.api)
        self._at = {**KIND, "namespace": connection.namespace}

    def create(self, text: str | None = None) -> None:
        body = ray_service_body(self.name, serve_text() if text is None else text)
        self._api.create_namespaced_custom_object(**self._at, body=body)

    def get(self) -> Any:
        return self._api.get_namespaced_custom_object(**self._at, name=self.name)

    @property
    def text(self) -> str:
        return str(self.get()["spec"]["serveConfigV2"])

    def write(self, text: str) -> None:
        """As somebody who asks nobody."""
        body = {"spec": {"serveConfigV2": text}}
        self._api.patch_namespaced_custom_object(**self._at, name=self.name, body=body)

    def touch(self, value: str) -> None:
        """A change that leaves the spec as it is."""
        body = {"metadata": {"annotations": {"touched": value}}}
        self._api.patch_namespaced_custom_object(**self._at, name=self.name, body=body)

    def delete(self) -> None:
        self._api.delete_namespaced_custom_object(**self._at, name=self.name)

    def report(self, statuses: Mapping[str, str], *, generation: int | None = None, ready: bool = True) -> None:
        """Writes the status as the operator does."""
        now = "2026-01-01T00:00:00Z"
        applications = {
            name: {
                "status": status,
                "message": "no node has a GPU" if status == "DEPLOY_FAILED" else "",
                "serveDeploymentStatuses": {"ExpertReplica": {"status": "HEALTHY", "message": ""}},
            }
            for name, status in statuses.items()
        }
        condition = {"type": "Ready", "status": "True" if ready else "False", "reason": "X", "message": "[x] y"}
        status = {
            "observedGeneration": self.get()["metadata"]["generation"] if generation is None else generation,
            "conditions": [condition | {"lastTransitionTime": now}],
            "numServeEndpoints": 2,
            "activeServiceStatus": {"rayClusterName": CLUSTER, "applicationStatuses": None},
        }
        # a merge patch keeps what it does not name, so the old ones go first
        for content in (status, {"activeServiceStatus": {"applicationStatuses": applications}}):
            self._api.patch_namespaced_custom_object_status(**self._at, name=self.name, body={"status": content})

    @contextmanager
    def operated(self, failing: str = "", leaving_s: float = 0.2) -> Iterator[None]:
        """An operator that sees each new generation, first reports what was before, and then what Ray Serve made of it.

        Applications whose name holds `failing` fail; those that are removed take a while.
        """
        stop = threading.Event()
        thread = threading.Thread(target=self._operate, args=(stop, failing, leaving_s), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _operate(self, stop: threading.Event, failing: str, leaving_s: float) -> None:
        seen, told = 0, dict.fromkeys(read_applications(self.text), "RUNNING")
        while not stop.wait(POLL_S):
            found = self.get()
            if found["metadata"]["generation"] == seen:
                continue
            seen = found["metadata"]["generation"]
            self.report(told, generation=seen)
            wanted = read_applications(found["spec"]["serveConfigV2"])
            self.report({name: "DEPLOYING" if name in wanted else "DELETING" for name in {*told, *wanted}})
            time.sleep(leaving_s)
            told = {name: "DEPLOY_FAILED" if failing and failing in name else "RUNNING" for name in wanted}
            self.report(told)


class PodObject:
    """A pod of CLUSTER as KubeRay labels it, on an API server where nothing runs it; without a pool it is the head."""

    def __init__(self, connection: Connection, name: str, pool: str = "", node: str | None = None) -> None:
        self.name, self.pool, self.node = name, pool, node
        self._namespace = connection.namespace
        self._api = client.CoreV1Api(connection.api)

    def create(self) -> None:
        kind = {"ray.io/node-type": "worker", "ray.io/group": self.pool} if self.pool else {"ray.io/node-type": "head"}
        spec = {"nodeName": self.node, "containers": [{"name": "ray", "image": "ray"}]}
        metadata = {"name": self.name, "labels": {"ray.io/cluster": CLUSTER, **kind}}
        self._api.create_namespaced_pod(self._namespace, {"metadata": metadata, "spec": spec})

    def report(self, phase: str, *, ready: bool, restarts: int) -> None:
        """Writes the status as a kubelet does."""
        container = {"name": "ray", "restartCount": restarts, "ready": ready, "image": "ray", "imageID": "ray"}
        conditions = [{"type": "Ready", "status": str(ready)}]
        status = {"phase": phase, "conditions": conditions, "containerStatuses": [container]}
        self._api.patch_namespaced_pod_status(self.name, self._namespace, {"status": status})


def account(server: ApiServer, namespace: str, rules: list[dict[str, Any]]) -> str:
    """A token of a new ServiceAccount that has these rights in its namespace, and no others."""
    api = admin(server, namespace).api
    core, rbac = client.CoreV1Api(api), client.RbacAuthorizationV1Api(api)
    name = f"account-{time.monotonic_ns()}"
    core.create_namespaced_service_account(namespace, {"metadata": {"name": name}})
    rbac.create_namespaced_role(namespace, {"metadata": {"name": name}, "rules": rules})
    binding = {
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
    }
    rbac.create_namespaced_role_binding(namespace, binding)
    asked = {"spec": {"audiences": ["https://kubernetes.default.svc"], "expirationSeconds": 3600}}
    token = core.create_namespaced_service_account_token(name, namespace, asked)
    return str(token.status.token)


def rule(group: str, resource: str, *verbs: str) -> dict[str, Any]:
    return {"apiGroups": [group], "resources": [resource], "verbs": list(verbs)}
