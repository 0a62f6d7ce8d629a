"""RayServices of one namespace on an API server: read, patched with optimistic locking, followed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import urllib3
from kubernetes import watch
from kubernetes.client import ApiException, CustomObjectsApi

from expertmesh.errors import ClusterError
from expertmesh.kubernetes.connection import Connection
from expertmesh.kubernetes.refusals import Conflict, NotThere, Unreachable, refusal
from expertmesh.kubernetes.service import Service, read_service

KIND = {"group": "ray.io", "version": "v1", "plural": "rayservices"}
RESOURCE = "rayservices.ray.io"
FIELD_MANAGER = "expertmesh"
TIMEOUT_S = (5.0, 30.0)
"""To connect, and for an answer."""
ATTEMPTS = 8
"""Of a patch, where others write at the same time."""
MAX_BACKOFF_S = 2.0
T = TypeVar("T")


@dataclass(frozen=True)
class Patched:
    before: str
    """serveConfigV2 as it was when it was changed."""
    after: str
    service: Service
    """As the API server answered; unchanged where both are equal."""

    @property
    def nothing(self) -> bool:
        return self.before == self.after


class RayServices:
    """Every method raises ClusterError with one line where the API server refuses or does not answer."""

    def __init__(self, connection: Connection) -> None:
        self.namespace = connection.namespace
        self._url = connection.url
        self._api = CustomObjectsApi(connection.api)

    def find(self, name: str | None) -> Service:
        """The named one, or the only one of the namespace."""
        if name is not None:
            return self.get(name)
        found = self._ask("list", self._api.list_namespaced_custom_object, namespace=self.namespace)["items"]
        if len(found) == 1:
            return read_service(found[0])
        if not found:
            raise NotThere(f"no RayService in namespace {self.namespace}")
        names = ", ".join(sorted(one["metadata"]["name"] for one in found))
        raise ClusterError(f"namespace {self.namespace} has more than one RayService ({names}); say which with --name")

    def get(self, name: str) -> Service:
        return read_service(
            self._ask("get", self._api.get_namespaced_custom_object, namespace=self.namespace, name=name)
        )

    def patch(self, name: str, edit: Callable[[str], str], *, dry_run: bool = False) -> Patched:
        """Replaces serveConfigV2 by what `edit` makes of it. Where others have changed the RayService since it was
        read, it is read and edited again, ATTEMPTS times at most. `edit` may raise to leave it as it is.

        With `dry_run` the API server checks all of it and keeps nothing.
        """
        for attempt in range(ATTEMPTS):
            found = self.get(name)
            after = edit(found.serve_config)
            if after == found.serve_config:
                return Patched(after, after, found)
            try:
                return Patched(found.serve_config, after, self._patch(found, after, dry_run=dry_run))
            except Conflict:
                time.sleep(random.uniform(0.05, 0.1) * 2 ** min(attempt, 4))
        lost = f"others changed it meanwhile (409), {ATTEMPTS} times"
        raise Conflict(f"RayService {self.namespace}/{name}: {lost}; nothing was changed")

    def follow(self, name: str, every_s: float = 30, silence_s: float = 60) -> Iterator[Service]:
        """The RayService now and after each change, and at least every so often, for ever.

        A watch that ends, whatever way, is opened again from a fresh read. Raises NotThere once the RayService is gone,
        and Unreachable where the API server has been silent for too long.
        """
        backoff_s, heard_at = 0.1, time.monotonic()
        while True:
            try:
                found = self.get(name)
                yield found
                backoff_s, heard_at = 0.1, time.monotonic()
                for event in self._watch(found, every_s):
                    if event["type"] == "DELETED":
                        raise NotThere(f"RayService {self.namespace}/{name} was deleted")
                    yield read_service(event["object"])
            except Unreachable:
                if time.monotonic() - heard_at > silence_s:
                    raise
                time.sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(MAX_BACKOFF_S, 2 * backoff_s)

    def _watch(self, since: Service, seconds: float) -> Iterator[dict[str, Any]]:
        """Raises Unreachable where the watch breaks, and where what it should go on from is too old (410)."""
        whole = max(1, round(seconds))
        options = {
            **KIND,
            "namespace": self.namespace,
            "field_selector": f"metadata.name={since.name}",
            "resource_version": since.resource_version,
            "timeout_seconds": whole,
            "_request_timeout": (TIMEOUT_S[0], whole + TIMEOUT_S[0]),
        }
        try:
            yield from watch.Watch().stream(self._api.list_namespaced_custom_object, **options)
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            if isinstance(error, ApiException) and error.status == 410:
                raise Unreachable(f"watch of {RESOURCE}: too old") from None
            raise refusal(error, f"watch {RESOURCE}", self.namespace, self._url) from None

    def _patch(self, found: Service, text: str, *, dry_run: bool) -> Service:
        body = {"metadata": {"resourceVersion": found.resource_version}, "spec": {"serveConfigV2": text}}
        options: dict[str, Any] = {"dry_run": "All"} if dry_run else {}
        answer = self._ask(
            "patch",
            self._api.patch_namespaced_custom_object,
            namespace=self.namespace,
            name=found.name,
            body=body,
            field_manager=FIELD_MANAGER,
            **options,
        )
        return read_service(answer)

    def _ask(self, verb: str, call: Callable[..., T], **options: Any) -> T:
        try:
            return call(**KIND, **options, _request_timeout=TIMEOUT_S)
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            raise refusal(error, f"{verb} {RESOURCE}", self.namespace, self._url) from None
