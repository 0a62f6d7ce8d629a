"""What `up` refuses to change in a cluster that runs, before it asks anything of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_values import config, manifest

from expertmesh.cluster import launch
from expertmesh.cluster.record import Record
from expertmesh.errors import ConfigError

TLS = {"ca": "/tls/ca.pem", "certificate": "/tls/c.pem", "key": "/tls/k.pem"}


def plan(**more: Any) -> launch.Plan:
    return launch.Plan(Path("c.yaml"), config(**more), manifest())


def running(tls: dict[str, str] | None) -> Record:
    """Nothing listens at its addresses."""
    port = 9001 if tls else 9000
    here = {"dashboard": "http://127.0.0.1:1", "http": "http://127.0.0.1:8000", "directory": f"127.0.0.1:{port}"}
    return Record.model_validate({"name": "c", "config": "c.yaml", "model": "tiny", "tls": tls} | here)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (None, {"security": {"tls": TLS}}, "security.tls: cluster 'c' keeps the files that it was started with"),
        (TLS, {}, "security.tls: cluster 'c' keeps the files that it was started with"),
        (TLS, {"security": {"tls": TLS | {"ca": "/other.pem"}}}, "security.tls: cluster 'c' keeps the files"),
        (TLS, {"security": {"tls": TLS}, "server": {"grpc_tls_port": 9002}}, "and 127.0.0.1:9001; stop it first"),
        (None, {"server": {"grpc_port": 9002}}, "listens on http://127.0.0.1:8000 and 127.0.0.1:9000; stop it first"),
    ],
)
def test_what_ray_was_started_with_stays(before: dict[str, str] | None, after: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        launch.change(plan(**after), running(before), 1.0, lambda _: None)
    assert said in str(refused.value)
