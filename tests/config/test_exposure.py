"""What `up` warns of: real listeners, on loopback and on this machine's other addresses."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from expertmesh.cluster.exposure import exposures, own_addresses
from expertmesh.config import ClusterConfig

LOOPBACK = "http://127.0.0.1:1"


def described(**sections: Any) -> ClusterConfig:
    groups = [{"name": "a", "experts": "0-3"}]
    return ClusterConfig.model_validate({"model": {"artifact": "/artifact"}, "groups": groups} | sections)


@contextmanager
def listening(host: str) -> Iterator[str]:
    with socket.socket() as one:
        one.bind((host, 0))
        one.listen()
        yield f"http://127.0.0.1:{one.getsockname()[1]}"


def test_by_default_nothing_is_exposed() -> None:
    with listening("127.0.0.1") as dashboard:
        assert exposures(described(), dashboard, None) == []


def test_an_api_without_keys() -> None:
    opened = {"server": {"host": "0.0.0.0", "http_port": 8000}}
    (line,) = exposures(described(**opened), LOOPBACK, None)
    assert line == "the OpenAI API at 0.0.0.0:8000 asks for no key (security.api_keys)"
    assert exposures(described(**opened, security={"api_keys": "keys.txt"}), LOOPBACK, None) == []


def test_replicas_without_tls() -> None:
    opened = {"server": {"replica_host": "auto"}}
    assert exposures(described(**opened), LOOPBACK, None) == [
        "replicas take rows from whoever reaches them (security.tls)"
    ]
    tls = {"ca": "ca.pem", "certificate": "cert.pem", "key": "key.pem"}
    assert exposures(described(**opened, security={"tls": tls}), LOOPBACK, None) == []


# such a machine cannot be reached from elsewhere: there is nothing to find
@pytest.mark.skipif(not own_addresses(), reason="this machine has no address but loopback")
def test_a_dashboard_on_all_addresses() -> None:
    with listening("0.0.0.0") as dashboard:
        (line,) = exposures(described(), dashboard, None)
        assert line.startswith(
            f"Ray's dashboard answers at {own_addresses()[0]}:{dashboard.rpartition(':')[2]} without"
        )
        assert exposures(described(), dashboard, "token") == []


def test_a_dashboard_elsewhere() -> None:
    (line,) = exposures(described(), "http://ray.example:8265", None)
    assert line.startswith("Ray's dashboard answers at ray.example:8265 without a token")
    assert exposures(described(), "http://localhost:1", None) == []
