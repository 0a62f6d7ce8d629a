"""Every config that cannot be served is refused with one line that names the file, the key and what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertmesh.config import load_config
from expertmesh.errors import ConfigError
from expertmesh.yaml_file import MAX_CONFIG_BYTES

GOOD = "model: {artifact: art}\ngroups: [{name: a, experts: 0-3}]\n"
TLS = "security: {tls: {ca: ca.pem, certificate: c.pem, key: k.pem}}\n"


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "cluster.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_relative_artifact_starts_at_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert config.model.artifact == tmp_path / "art"
    assert config.server.http_port == 8000


def test_without_tls_its_port_may_be_any(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, GOOD + "server: {http_port: 9001}\n")).server.http_port == 9001


def test_an_absolute_artifact_stays(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, GOOD.replace("art}", "/data/art}"))).model.artifact == Path("/data/art")


def test_numbers_in_experts_are_indices(tmp_path: Path) -> None:
    text = "model: {artifact: art}\ngroups: [{name: a, experts: 3}, {name: b, experts: {4: 0-2, 5: 1}}]"
    groups = load_config(write(tmp_path, text)).groups
    assert groups[0].experts == "3"
    assert groups[1].experts == {"4": "0-2", "5": "1"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n", "holds no keys"),
        ("just words", "holds no keys"),
        ("model: [\n", "not YAML"),
        ("model: {artifact: a}\n\tgroups: 3", ":2:1: not YAML"),
        (b"\xff\xfe\x00model", "not text in UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ("#" * (MAX_CONFIG_BYTES + 1), "larger than 1 MiB"),
        (GOOD + "modell: 3\n", "modell: unknown key"),
        (GOOD.replace("experts: 0-3", "experts: 0-3, num_cpu: 2"), "groups.0.num_cpu: unknown key"),
        ("model: {artifact: art}\n", "groups: is missing"),
        ("model: {artifact: art}\ngroups: []\n", "groups: "),
        (GOOD.replace("experts: 0-3", "experts: [1]"), "groups.0.experts: "),
        (GOOD.replace("name: a", "name: A!"), "groups.0.name: "),
        (GOOD.replace("0-3}", "0-3}, {name: a, experts: 4}"), "groups: 'a' stands twice"),
        (GOOD.replace("0-3", "0-3, min_replicas: 3, max_replicas: 2"), "max_replicas 2 < min_replicas 3"),
        (GOOD + "engine: {min_replicas: 2}\n", "engine: max_replicas 1 < min_replicas 2"),
        (GOOD + "server: {http_port: 70000}\n", "server.http_port: "),
        (GOOD + "server: {http_port: 9000}\n", "http_port and grpc_port are both 9000"),
        (GOOD + TLS + "server: {http_port: 9001}\n", "server: http_port and grpc_tls_port are both 9001"),
        (GOOD + TLS + "server: {grpc_port: 9001}\n", "server: grpc_port and grpc_tls_port are both 9001"),
        (GOOD + TLS + "server: {replica_ports: [9001, 9002]}\n", "grpc_tls_port 9001 lies within replica_ports"),
        (GOOD + "engine: {dtype: int3}\n", "engine.dtype: "),
    ],
)
def test_refused_with_one_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(("name", "said"), [("absent.yaml", "no such file"), (".", "is a directory")])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / name)
