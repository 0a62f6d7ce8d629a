"""Mutual TLS between a router and replicas, over real sockets with certificates made here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch
from certificates import Authority
from mesh import TRANSPORTS, group_args, running_directory
from tiny_models import EXPERTS, make_checkpoint

from expert_service.replica import Replica
from expertmesh.artifact.manifest import read_manifest
from expertmesh.artifact.prepare import prepare
from expertmesh.config import load_config
from expertmesh.errors import ConfigError
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.v1 import expert_pb2_grpc
from expertmesh.wire.tls import TlsFiles
from router_service.connection import RouterSettings, open_transport
from router_service.dispatcher import Dispatcher
from router_service.recovery import ExpertsUnavailable
from router_service.replicas import LiveReplicas


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    prepare(make_checkpoint("mixtral", folder / "checkpoint"), folder / "artifact")
    return folder / "artifact"


@pytest.fixture(scope="module")
def directory() -> Iterator[str]:
    with running_directory() as address:
        yield address


@contextmanager
def replica(artifact: Path, directory: str, tls: TlsFiles | None, transport: str = "auto") -> Iterator[Replica]:
    more = {"tls": tls, "transport": transport, "lease_ms": 600}
    made = Replica(group_args(artifact, directory, "g", set(range(EXPERTS)), **more), directory)
    try:
        yield made
    finally:
        made.drain(1.0)
        made.stop()


@contextmanager
def dispatcher(
    artifact: Path, directory: str, tls: TlsFiles | None, wait_s: float, transport_name: str = "auto"
) -> Iterator[Dispatcher]:
    live = LiveReplicas()
    settings = RouterSettings.model_validate({"directory": directory, "tls": tls, "transport": transport_name})
    transport = open_transport(settings, read_manifest(artifact).fingerprint, live)
    try:
        yield Dispatcher(live, transport, wait_s)
    finally:
        transport.close()


def step(made: Dispatcher) -> torch.Tensor:
    ids = torch.tensor([[0, 1], [2, 3]])
    return made.finish(made.start(0, torch.ones(2, 64), ids, torch.full((2, 2), 0.5)))


@pytest.mark.parametrize("server", TRANSPORTS)
@pytest.mark.parametrize("client", TRANSPORTS)
def test_rows_cross_with_the_certificate_of_one_authority(
    artifact: Path, directory: str, tmp_path: Path, client: str, server: str
) -> None:
    tls = Authority(tmp_path).issue()
    with replica(artifact, directory, None), dispatcher(artifact, directory, None, 30) as plain:
        expected = step(plain)
    with (
        replica(artifact, directory, tls, server) as served,
        dispatcher(artifact, directory, tls, 30, client) as made,
    ):
        assert torch.equal(step(made), expected)
        assert served.load().rows_total == 2


@pytest.mark.parametrize("client", TRANSPORTS)
def test_a_shared_name_stands_in_for_addresses(artifact: Path, directory: str, tmp_path: Path, client: str) -> None:
    named = Authority(tmp_path).issue(name="experts.internal")
    unnamed = named.model_copy(update={"server_name": None})
    with replica(artifact, directory, named):
        with dispatcher(artifact, directory, named, 30, client) as made:
            assert step(made).shape == (2, 64)
        with dispatcher(artifact, directory, unnamed, 1, client) as made, pytest.raises(ExpertsUnavailable):
            step(made)


def test_a_router_refuses_a_replica_of_another_authority(artifact: Path, directory: str, tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path, "ours").issue(), Authority(tmp_path, "theirs").issue()
    with replica(artifact, directory, theirs) as served:
        with dispatcher(artifact, directory, ours, 1) as made, pytest.raises(ExpertsUnavailable):
            step(made)
        assert served.load().rows_total == 0


def describe(address: str, credentials: grpc.ChannelCredentials | None) -> pb.DescribeResponse:
    opened = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
    with opened as channel:
        return expert_pb2_grpc.ExpertServiceStub(channel).Describe(pb.DescribeRequest(), timeout=10)


@pytest.mark.parametrize("server", TRANSPORTS)
def test_a_replica_refuses_callers_that_do_not_prove_who_they_are(
    artifact: Path, directory: str, tmp_path: Path, server: str
) -> None:
    tls = Authority(tmp_path, "ours").issue()
    pem, other = tls.read(), Authority(tmp_path, "theirs").issue().read()
    with replica(artifact, directory, tls, server) as served:
        known = describe(served.address, grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate))
        assert known.group == "g"
        for credentials in (
            None,
            grpc.ssl_channel_credentials(pem.ca),
            grpc.ssl_channel_credentials(pem.ca, other.key, other.certificate),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                describe(served.address, credentials)
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("damage", ["absent", "not PEM"])
def test_a_file_that_cannot_serve_is_named(artifact: Path, directory: str, tmp_path: Path, damage: str) -> None:
    tls = Authority(tmp_path).issue()
    wrong = tmp_path / "wrong.pem"
    if damage == "not PEM":
        wrong.write_text("certificate")
    with pytest.raises(ConfigError, match=r"security\.tls\.key: .*wrong\.pem: (no such file|is not PEM)"):
        Replica(group_args(artifact, directory, "g", {0}, tls=tls.model_copy(update={"key": wrong})), directory)


def test_paths_in_a_config_start_at_its_folder(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(
        "model: {artifact: a}\n"
        "groups: [{name: g, experts: 0-7}]\n"
        "security: {tls: {ca: ca.pem, certificate: /etc/c.pem, key: tls/key.pem}}\n"
    )
    tls = load_config(tmp_path / "cluster.yaml").security.tls
    assert tls == TlsFiles(ca=tmp_path / "ca.pem", certificate=Path("/etc/c.pem"), key=tmp_path / "tls/key.pem")
