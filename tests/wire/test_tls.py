"""Mutual TLS between a router and replicas, over real sockets with certificates made here."""

from __future__ import annotations

import datetime
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch
from certificates import Authority, install
from mesh import TRANSPORTS, group_args, running_directory
from tiny_models import EXPERTS, make_checkpoint

from expert_service.replica import Replica
from expertmesh.artifact.manifest import read_manifest
from expertmesh.artifact.prepare import prepare
from expertmesh.config import load_config
from expertmesh.errors import ConfigError
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.v1 import expert_pb2_grpc
from expertmesh.wire.tls import TlsBytes, TlsFiles
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


@pytest.mark.parametrize("damage", ["absent", "not PEM", "of another"])
def test_a_file_that_cannot_serve_is_named(artifact: Path, directory: str, tmp_path: Path, damage: str) -> None:
    tls = Authority(tmp_path).issue()
    wrong = tmp_path / "wrong.pem"
    if damage == "not PEM":
        wrong.write_text("certificate")
    if damage == "of another":
        wrong.write_bytes(Authority(tmp_path, "theirs").issue().read().key)
    with pytest.raises(ConfigError, match=r"security\.tls\.key: .*wrong\.pem: (no such file|is not)"):
        Replica(group_args(artifact, directory, "g", {0}, tls=tls.model_copy(update={"key": wrong})), directory)


def credentials(pem: TlsBytes) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)


def refuses(address: str, pem: TlsBytes) -> bool:
    """Whether a new connection that shows and trusts these is refused."""
    try:
        describe(address, credentials(pem))
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        return True
    return False


@contextmanager
def steps_without_end(made: Dispatcher) -> Iterator[None]:
    """Steps follow one another meanwhile; raises what one of them raised."""
    ended, failures = threading.Event(), list[ExpertsUnavailable]()

    def run() -> None:
        while not ended.is_set() and not failures:
            try:
                step(made)
            except ExpertsUnavailable as error:
                failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("server", TRANSPORTS)
@pytest.mark.parametrize("client", TRANSPORTS)
def test_certificates_and_authorities_are_replaced_while_rows_cross(
    artifact: Path, directory: str, tmp_path: Path, client: str, server: str
) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    ours, theirs = old.issue(), Authority(tmp_path, "theirs").issue()
    install(ours, theirs, "ca", "certificate", "key")  # router and replica each have files of their own
    of_old = ours.read()
    with (
        replica(artifact, directory, theirs, server) as served,
        dispatcher(artifact, directory, ours, 30, client) as made,
        steps_without_end(made),
    ):
        rows = served.load().rows_total
        again = old.issue()
        for files in (ours, theirs):
            install(again, files, "certificate", "key")
        assert not refuses(served.address, ours.read())
        for files in (ours, theirs):
            install(files, files, authorities=(old, new))
        assert not refuses(served.address, of_old)
        of_new = new.issue()
        for files in (ours, theirs):
            install(of_new, files, "certificate", "key")
        only_new = of_new.read()
        assert refuses(served.address, of_old)  # it trusts the old authority alone, the replica is of the new
        assert not refuses(served.address, only_new)
        still_of_old = TlsBytes(ours.read().ca, of_old.certificate, of_old.key)
        assert not refuses(served.address, still_of_old)
        for files in (ours, theirs):
            install(files, files, authorities=(new,))
        assert refuses(served.address, still_of_old)
        assert not refuses(served.address, only_new)
        step(made)
        assert served.load().rows_total > rows
        # the router's own new connections are of the new authority too
        with replica(artifact, directory, of_new, server) as second:
            until = time.monotonic() + 30
            while not second.load().rows_total and time.monotonic() < until:
                step(made)
            assert second.load().rows_total


@pytest.mark.parametrize("server", TRANSPORTS)
def test_an_expired_certificate_is_refused(artifact: Path, directory: str, tmp_path: Path, server: str) -> None:
    authority = Authority(tmp_path)
    expired = authority.issue(left=-datetime.timedelta(minutes=1)).read()
    tls = authority.issue()
    with replica(artifact, directory, tls, server) as served:
        assert refuses(served.address, expired)
        assert not refuses(served.address, tls.read())


@pytest.mark.parametrize("server", TRANSPORTS)
def test_many_connect_at_once_while_files_are_replaced(
    artifact: Path, directory: str, tmp_path: Path, server: str
) -> None:
    authority = Authority(tmp_path)
    tls = authority.issue()
    shown, refused = tls.read(), []
    begin, ended = threading.Barrier(5), threading.Event()

    def connect() -> None:
        begin.wait()
        while not ended.is_set():
            refused.append(refuses(served.address, shown))

    with replica(artifact, directory, tls, server) as served:
        threads = [threading.Thread(target=connect) for _ in range(4)]
        for thread in threads:
            thread.start()
        begin.wait()
        for _ in range(3):
            so_far = len(refused)
            while len(refused) < so_far + 200 and any(thread.is_alive() for thread in threads):
                time.sleep(0.01)
            authority.issue()  # over the files in use
        ended.set()
        for thread in threads:
            thread.join()
    assert len(refused) >= 600
    assert not any(refused)


@pytest.mark.parametrize("server", TRANSPORTS)
def test_a_port_in_use_is_passed_over(artifact: Path, directory: str, tmp_path: Path, server: str) -> None:
    tls = Authority(tmp_path).issue()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        more = {"tls": tls, "transport": server, "ports": (port, port + 20)}
        made = Replica(group_args(artifact, directory, "g", {0}, **more), directory)
        try:
            assert made.address != f"127.0.0.1:{port}"
            assert not refuses(made.address, tls.read())
        finally:
            made.stop()


@pytest.mark.parametrize("server", TRANSPORTS)
def test_files_that_do_not_fit_leave_the_last_good_ones_in_use(
    artifact: Path, directory: str, tmp_path: Path, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path, "ours")
    tls = authority.issue()
    shown = tls.read()
    good = {name: getattr(tls, name).read_bytes() for name in ("ca", "certificate", "key")}
    other = Authority(tmp_path, "theirs").issue().read()
    damage = {"key": other.key, "certificate": shown.certificate[:300], "ca": b""}
    with caplog.at_level(logging.WARNING, "expertmesh.wire.tls"), replica(artifact, directory, tls, server) as served:
        for name, content in damage.items():
            caplog.clear()
            path: Path = getattr(tls, name)
            path.write_bytes(content)
            for _ in range(3):
                assert not refuses(served.address, shown)
            (said,) = [record.getMessage() for record in caplog.records if record.name == "expertmesh.wire.tls"]
            assert str(path) in said
            assert "the files read before stay in use" in said
            path.write_bytes(good[name])
        tls.key.unlink()
        assert not refuses(served.address, shown)
        install(Authority(tmp_path, "last").issue(), tls, "ca", "certificate", "key")
        assert refuses(served.address, shown)
        assert not refuses(served.address, tls.read())


@pytest.mark.parametrize("client", TRANSPORTS)
def test_a_router_with_files_that_do_not_fit_connects_with_the_last_good_ones(
    artifact: Path, directory: str, tmp_path: Path, client: str
) -> None:
    ours = Authority(tmp_path, "ours")
    tls, theirs = ours.issue(), Authority(tmp_path, "theirs").issue()
    install(tls, theirs, "ca", "certificate", "key")
    with dispatcher(artifact, directory, tls, 30, client) as made:
        tls.key.unlink()
        with replica(artifact, directory, theirs):
            assert step(made).shape == (2, 64)


def test_paths_in_a_config_start_at_its_folder(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(
        "model: {artifact: a}\n"
        "groups: [{name: g, experts: 0-7}]\n"
        "security: {tls: {ca: ca.pem, certificate: /etc/c.pem, key: tls/key.pem}}\n"
    )
    tls = load_config(tmp_path / "cluster.yaml").security.tls
    assert tls == TlsFiles(ca=tmp_path / "ca.pem", certificate=Path("/etc/c.pem"), key=tmp_path / "tls/key.pem")
