"""Where a run goes: addresses, from the config or from the record of a running cluster."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.cluster import record
from expertmesh.cluster.record import Record
from expertmesh.wire.tls import TlsFiles
from loadtest.config import OpenAITarget, RunConfig


@dataclass(frozen=True)
class Endpoint:
    http: str | None
    """URL of the OpenAI API, up to and with /v1; None for an expert tier that has none."""
    model: str | None
    """Name to ask for; None: the first that the endpoint lists."""
    directory: str | None
    """host:port of the directory, where one is known."""
    cluster: Record | None
    """Of a cluster that `expertmesh up` runs here."""
    tls: TlsFiles | None = None
    """Where directory and replicas ask for certificates."""


def find_endpoint(config: RunConfig) -> Endpoint:
    """Raises ClusterError where the cluster that the target names is not known here."""
    target = config.target
    cluster = None
    if target.cluster is not None:
        cluster = record.require(None if target.cluster == "auto" else target.cluster)
    if isinstance(target, OpenAITarget):
        if cluster is None:
            return Endpoint((target.url or "").rstrip("/"), target.model, None, None)
        return Endpoint(f"{cluster.http}/v1", target.model or cluster.model, cluster.directory, cluster, cluster.tls)
    if cluster is None:
        return Endpoint(None, None, target.directory, None, target.tls)
    return Endpoint(f"{cluster.http}/v1", cluster.model, cluster.directory, cluster, target.tls or cluster.tls)
