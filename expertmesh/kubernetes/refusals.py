"""What the API server refuses, and why it does not answer, in one line."""

from __future__ import annotations

import json
from typing import Any

import urllib3
from kubernetes.client import ApiException

from expertmesh.errors import ClusterError


class Unreachable(ClusterError):
    """The API server does not answer, or not now."""


class NotAllowed(ClusterError):
    """The caller's rights do not suffice."""


class NotThere(ClusterError):
    """An object, or its kind, is not on the cluster."""


class Conflict(ClusterError):
    """Somebody else has changed the object since it was read."""


def refusal(error: ApiException | urllib3.exceptions.HTTPError, asked: str, namespace: str, url: str) -> ClusterError:
    """`asked` is verb and resource, such as `patch rayservices.ray.io`."""
    if not isinstance(error, ApiException):
        return Unreachable(f"the API server at {url} does not answer: {_reason(error)}")
    status, said = error.status, _status(error)
    message = " ".join(str(said.get("message") or error.reason or "no reason given").split())
    if status in (401, 403):
        why = message if status == 403 else f"{url} does not accept the credentials; have they expired?"
        return NotAllowed(f"not allowed to {asked} in namespace {namespace} ({status}): {why}")
    if status == 404:
        return NotThere(_absent(said, asked, namespace, message))
    if status == 409:
        return Conflict(f"{asked} in namespace {namespace}: {message}")
    if status == 429 or status >= 500:
        return Unreachable(f"the API server at {url} cannot {asked} now ({status}): {message}")
    return ClusterError(f"the API server refuses to {asked} in namespace {namespace} ({status}): {message}")


def _absent(said: dict[str, Any], asked: str, namespace: str, message: str) -> str:
    """An object that is not there is named in the answer, be it another one than was asked for, such as a pod's node;
    a kind that is not known has no such answer."""
    details, kind = said.get("details") or {}, asked.rsplit(maxsplit=1)[-1]
    name, absent = details.get("name"), ".".join(filter(None, (details.get("kind"), details.get("group"))))
    if name and absent == kind:
        return f"no {kind} named {name} in namespace {namespace}"
    if name:
        return f"cannot {asked} in namespace {namespace}: {message}"
    return f"the cluster does not know {kind}" + ("; is the KubeRay operator installed?" if "ray.io" in kind else "")


def _status(error: ApiException) -> dict[str, Any]:
    try:
        said = json.loads(error.body or "")
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _reason(error: urllib3.exceptions.HTTPError) -> str:
    """Without the connection object that urllib3 puts before its reasons."""
    inner = getattr(error, "reason", None) or error
    line = " ".join(str(inner).split())
    return line.rpartition("object at")[2].partition(": ")[2] or line or type(error).__name__
