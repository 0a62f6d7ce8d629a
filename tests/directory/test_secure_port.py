"""The directory behind Ray Serve's own gRPC proxy, which asks for certificates at a port of ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, install

from expertmesh.args import ROUTER_APPLICATION
from expertmesh.artifact.manifest import read_manifest
from expertmesh.cluster import local_ray, processes
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.cluster.smoke import check_groups, check_health
from expertmesh.config import ClusterConfig
from expertmesh.deployment import directory_address, serve_config
from expertmesh.directory import app, secure_port
from expertmesh.directory.client import METADATA, list_table, scaling, watch
from expertmesh.errors import ClusterError, ConfigError
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import directory_pb2_grpc, expert_pb2
from expertmesh.wire.channel import client_side
from expertmesh.wire.tls import CurrentTls, TlsFiles

START_S = 120.0
GROUP = "a"
LEASE_MS = 1000
FORGED = (
    *METADATA,
    ("transport_security_type", "ssl"),
    (secure_port.CERTIFICATE, "-----BEGIN CERTIFICATE-----"),
    ("x-forwarded-client-cert", "Hash=00;Subject=CN=peer"),
)
"""What a caller says of itself."""


@dataclass(frozen=True)
class Secured:
    config: ClusterConfig
    tls: TlsFiles
    authority: Authority

    @property
    def plain(self) -> str:
        return f"127.0.0.1:{self.config.server.grpc_port}"

    @property
    def directory(self) -> str:
        return directory_address(self.config)


@pytest.fixture(scope="module")
def secured(demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Ray of our own with the directory and one group, as `up` would deploy them."""
    folder = tmp_path_factory.mktemp("secured")
    authority = Authority(folder, "ours")
    tls = authority.issue()
    ports = dict(zip(("http_port", "grpc_port", "grpc_tls_port"), local_ray.free_ports(3), strict=True))
    config = ClusterConfig.model_validate(
        {
            "model": {"artifact": demo_artifact},
            "groups": [{"name": GROUP, "experts": "0-15"}],
            "server": ports,
            "directory": {"lease_ms": LEASE_MS},
            "security": {"tls": tls},
        }
    )
    ray = local_ray.start(4, folder / "ray.log", variables=secure_port.environment(config))
    try:
        local_ray.wait_until_up(ray, START_S, lambda: None)
        made = serve_config(config, read_manifest(demo_artifact))
        made["applications"] = [one for one in made["applications"] if one["name"] != ROUTER_APPLICATION]
        ServeApi(ray.dashboard, ray.token).deploy(made)
        made_secure = Secured(config, tls, authority)
        wait(lambda: "1 replicas" in check_groups(made_secure.directory, [GROUP], tls))
        yield made_secure
    finally:
        processes.end(ray.marker, 15)


def wait(condition: Callable[[], Any]) -> None:
    """Until it holds, raising no ClusterError."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            if condition():
                return
            reason = "the condition does not hold"
        except ClusterError as error:
            reason = str(error)
        assert time.monotonic() < deadline, reason
        time.sleep(0.2)


def entry() -> pb.Replica:
    state = expert_pb2.REPLICA_STATE_READY
    return pb.Replica(replica_id="rogue", group=GROUP, address="127.0.0.1:1", fingerprint="f", state=state)


REQUESTS = {
    "Announce": pb.AnnounceRequest(replica=entry(), lease_ms=60_000),
    "Withdraw": pb.WithdrawRequest(replica_id="rogue"),
    "List": pb.ListRequest(),
    "ExpertLoad": pb.ExpertLoadRequest(),
    "Want": pb.WantRequest(layer=0, experts=[0]),
    "ReportDecision": pb.ScalingDecision(group=GROUP, target=7, min_replicas=0, max_replicas=9),
    "Scaling": pb.ScalingRequest(),
    "Watch": pb.WatchRequest(),
}


def call(channel: grpc.Channel, name: str) -> Any:
    """The answer, of a stream the first."""
    made = getattr(directory_pb2_grpc.DirectoryServiceStub(channel), name)
    answer = made(REQUESTS[name], metadata=FORGED, timeout=30)
    return next(answer) if name == "Watch" else answer


def ids(secured: Secured) -> list[str]:
    return [one.replica_id for one in list_table(secured.directory, tls=secured.tls).replicas]


def test_replicas_routers_and_the_autoscaler_reach_it(secured: Secured) -> None:
    async def first() -> pb.Table:
        tables = watch(secured.directory, secured.tls)
        try:
            async with asyncio.timeout(START_S):
                return await anext(tables)
        finally:
            await tables.aclose()

    assert [one.group for one in asyncio.run(first()).replicas] == [GROUP]
    wait(lambda: [one.last.group for one in scaling(secured.directory, tls=secured.tls).groups] == [GROUP])


def test_every_call_is_tried() -> None:
    assert set(REQUESTS) == set(pb.DESCRIPTOR.services_by_name["DirectoryService"].methods_by_name)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_plain_port_gives_nothing_and_takes_nothing(secured: Secured, name: str) -> None:
    decided = scaling(secured.directory, tls=secured.tls).groups[0].last
    with grpc.insecure_channel(secured.plain) as channel, pytest.raises(grpc.RpcError) as refused:
        call(channel, name)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert refused.value.details() == "directory: come by server.grpc_tls_port, with a certificate (security.tls)"
    assert "rogue" not in ids(secured)
    assert decided.target == 1
    assert scaling(secured.directory, tls=secured.tls).groups[0].last.target == 1


def test_the_plain_port_tells_that_serve_is_well(secured: Secured) -> None:
    assert check_health(secured.plain) == "gRPC health check: success"


def test_only_certificates_of_the_authority_get_in(secured: Secured, tmp_path: Path) -> None:
    ours, theirs = secured.tls.read(), Authority(tmp_path, "theirs").issue().read()
    for credentials in (
        None,
        grpc.ssl_channel_credentials(ours.ca),
        grpc.ssl_channel_credentials(ours.ca, theirs.key, theirs.certificate),
    ):
        opened = (
            grpc.secure_channel(secured.directory, credentials)
            if credentials
            else grpc.insecure_channel(secured.directory)
        )
        with opened as channel, pytest.raises(grpc.RpcError) as refused:
            call(channel, "Announce")
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "rogue" not in ids(secured)
    credentials, _ = client_side(CurrentTls(secured.tls))
    with grpc.secure_channel(secured.directory, credentials) as channel:
        call(channel, "Announce")
        assert "rogue" in ids(secured)
        call(channel, "Withdraw")
    assert "rogue" not in ids(secured)


def test_files_are_replaced_while_it_runs(secured: Secured, tmp_path: Path) -> None:
    """Another authority altogether, step by step: the replica stays announced, and is the same."""
    tls, new, before = secured.tls, Authority(tmp_path, "new"), ids(secured)
    old = tls.read()
    of_old = grpc.ssl_channel_credentials(old.ca, old.key, old.certificate)
    steps: list[Callable[[], None]] = [
        lambda: install(tls, tls, authorities=(secured.authority, new)),
        lambda: install(new.issue(), tls, "certificate", "key"),
        lambda: install(tls, tls, authorities=(new,)),
    ]
    for step in steps:
        step()
        time.sleep(2 * LEASE_MS / 1000)
        assert ids(secured) == before
    with grpc.secure_channel(secured.directory, of_old) as channel, pytest.raises(grpc.RpcError) as refused:
        call(channel, "List")
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_it_does_not_begin_where_the_proxy_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(secure_port.VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=f"{secure_port.VARIABLE} is missing in the environment that Ray was started"):
        app.build({"require_certificate": True})


def test_a_variable_that_says_something_else_is_named() -> None:
    with pytest.raises(ConfigError, match=f"{secure_port.VARIABLE}: tls: is missing"):
        secure_port.secure_port({secure_port.VARIABLE: '{"port": 1}'})
