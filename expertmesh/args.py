"""Arguments of the Serve applications, as they stand under `args:` in a Serve config.

A change of an application's args restarts it; replica bounds and Ray resources are therefore not here but in the
`deployments:` override.
"""

from __future__ import annotations

from typing import Literal

from expertmesh.config import EmulatedDevice, EngineSection, Experts, Section
from expertmesh.wire.tls import TlsFiles

DIRECTORY_APPLICATION = "directory"
DIRECTORY_DEPLOYMENT = "Directory"
DIRECTORY_ROUTE_PREFIX = "/-/directory"
"""Serve's gRPC proxy knows only applications that have one; over HTTP nothing answers there."""
ROUTER_APPLICATION = "router"
ROUTER_DEPLOYMENT = "LLMServer:Router"
EXPERTS_DEPLOYMENT = "ExpertReplica"


def experts_application(group: str) -> str:
    return f"experts-{group}"


class GroupArgs(Section):
    """Of `expert_service.app:build`."""

    artifact: str
    group: str
    experts: Experts
    """As the config writes them; what that means in each layer is in the artifact's manifest."""
    num_threads: int = 1
    device: str = "cpu"
    """A torch device; `cuda` is the GPU that Ray assigned."""
    emulated: EmulatedDevice | None = None
    host: str = "127.0.0.1"
    """Where the gRPC server listens and is announced; `auto`: the node's address."""
    ports: tuple[int, int] | None = None
    directory: str = "127.0.0.1:9000"
    lease_ms: int = 3000
    max_queued_rows: int = 65536
    tls: TlsFiles | None = None
    transport: Literal["auto", "native", "python"] = "auto"
    """auto: the native server where it is installed."""


class RouterArgs(Section):
    """Of `router_service.app:build`."""

    artifact: str
    name: str
    """Of the model in the OpenAI API."""
    engine: EngineSection = EngineSection()
    directory: str = "127.0.0.1:9000"
    tls: TlsFiles | None = None
    api_keys: str | None = None
    """File of the hashes of the keys that the OpenAI API asks for."""


class DirectoryArgs(Section):
    """Of `expertmesh.directory.app:build`."""

    require_certificate: bool = False
    """Whether callers that show none are refused; for a proxy with a port that asks for it."""
