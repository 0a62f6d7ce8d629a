"""`expertmesh api-key`: keys are shown once, files hold hashes, wrong input changes nothing."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from expertmesh import api_keys
from expertmesh.api_keys import client_key
from expertmesh.cli import app
from expertmesh.config import load_config
from expertmesh.errors import ConfigError
from loadtest.config import OpenAITarget
from loadtest.openai_target import headers_of


def run(*arguments: str) -> tuple[str, str]:
    """What it wrote to stdout and stderr."""
    done = CliRunner().invoke(app, ["api-key", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.txt"


def create(file: Path, *arguments: str) -> str:
    out, err = run("create", "--file", str(file), *arguments)
    key = out.removesuffix("\n")
    assert re.fullmatch(r"em-[A-Za-z0-9_-]{43}", key), "a key alone, so that $(...) takes it"
    assert key not in err
    return key


@pytest.mark.parametrize("command", [(), ("create",), ("list",), ("revoke",)])
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    assert "expertmesh api-key" in CliRunner().invoke(app, ["api-key", *command, "--help"]).output.split("Example")[1]


def test_the_file_holds_the_hash_alone(file: Path) -> None:
    key = create(file, "--name", "alice")
    text = file.read_text()
    assert key not in text and key[3:] not in text
    (kept,) = api_keys.read(file)
    assert (kept.name, kept.sha256) == ("alice", hashlib.sha256(key.encode()).hexdigest())
    assert abs(datetime.datetime.now(datetime.UTC).date() - kept.created) <= datetime.timedelta(days=1)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_keys_differ_and_get_names(file: Path) -> None:
    assert len({create(file) for _ in range(3)}) == 3
    run("revoke", "key-2", "--file", str(file))
    create(file)
    listed = json.loads(run("list", "--file", str(file), "--json")[0])
    assert [one["name"] for one in listed] == ["key-1", "key-3", "key-2"]
    shown = run("list", "--file", str(file))[0]
    assert "key-3" in shown and listed[0]["created"] in shown
    assert not any(key.sha256[:8] in shown for key in api_keys.read(file))


def test_comments_mode_and_link_stay(file: Path, tmp_path: Path) -> None:
    create(file, "--name", "a")
    file.write_text(f"# ours\n{file.read_text()}\n  # end")
    file.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(file)
    create(link, "--name", "b")
    run("revoke", "a", "--file", str(link))
    assert link.is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [one.name for one in api_keys.read(file)] == ["b"]
    assert file.read_text().startswith("# ours\n") and "\n  # end\n" in file.read_text()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["keys.txt", "link"]


def test_many_at_once_lose_none(file: Path) -> None:
    program = (
        f"from expertmesh import api_key_file; from pathlib import Path; api_key_file.create(Path({str(file)!r}), None)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(6)]
    assert [process.wait(60) for process in processes] == [0] * 6
    assert {one.name for one in api_keys.read(file)} == {f"key-{number}" for number in range(1, 7)}


HASH = "0" * 64


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        (None, ["list"], "no such file or directory"),
        (None, ["revoke", "a"], "no such file or directory"),
        (f"a {HASH} 2025-01-31\n", ["create", "--name", "a"], "has a key 'a' already"),
        (f"a {HASH} 2025-01-31\n", ["revoke", "b"], "has no key 'b'"),
        ("", ["create", "--name", "two words"], "no name of a key"),
        ("", ["create", "--name", "x" * 64], "no name of a key"),
        ("", ["create", "--name", "em-" + "A" * 43], "no name of a key"),
        ("", ["revoke", "em-" + "A" * 43], "has no key of that name"),
        (f"a {HASH}\n", ["create"], ":1: is not NAME SHA256 DATE"),
        (f"# x\n\na {HASH[1:]} 2025-01-31\n", ["list"], ":3: is not NAME SHA256 DATE"),
        (f"a {HASH} 2025-02-30\n", ["revoke", "a"], ":1: is not NAME SHA256 DATE"),
        (f"a {HASH} 2025-01-31\na {HASH} 2025-01-31\n", ["create"], ":2: key 'a' stands twice"),
        (f"em-{'A' * 43} {HASH} 2025-01-31\n", ["list"], ":1: is not NAME SHA256 DATE"),
        (b"\xff\xfe", ["create"], "not text in UTF-8"),
        (b"#" * (2**20 + 1), ["create"], "larger than 1 MiB"),
    ],
)
def test_refused_with_one_line(file: Path, content: str | bytes | None, arguments: list[str], said: str) -> None:
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = file.read_bytes() if file.exists() else None
    with pytest.raises(ConfigError) as caught:
        run(*arguments, "--file", str(file))
    message = str(caught.value)
    assert said in message and "\n" not in message
    assert "A" * 43 not in message, "what looks like a key is not repeated"
    assert (file.read_bytes() if file.exists() else None) == before
    assert [one.name for one in file.parent.iterdir()] in ([], [file.name])


@pytest.mark.parametrize("where", ["absent/keys.txt", ""])
def test_a_place_for_no_file(tmp_path: Path, where: str) -> None:
    with pytest.raises(ConfigError, match=r"no such file or directory|is a directory"):
        run("create", "--file", str(tmp_path / where))
    assert list(tmp_path.iterdir()) == []


def test_the_key_that_clients_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert client_key() is None
    monkeypatch.setenv("OPENAI_API_KEY", "sk-any")
    assert client_key() == "sk-any"
    for bad in ("sk-\u00e4", "sk any", "sk\nany"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(ConfigError, match="OPENAI_API_KEY: holds a character") as caught:
            client_key()
        assert "sk" not in str(caught.value)


def test_a_config_names_the_file(tmp_path: Path) -> None:
    """Its path starts at the config, and links on it stay, so that a swapped one is followed."""
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to("real")
    config = tmp_path / "cluster.yaml"
    config.write_text(
        "model: {artifact: art}\ngroups: [{name: a, experts: 0-3}]\nsecurity: {api_keys: linked/keys.txt}\n"
    )
    assert load_config(config).security.api_keys == tmp_path / "linked" / "keys.txt"


def test_load_tests_send_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-any")
    monkeypatch.setenv("OTHER", "sk-other")

    def headers(**more: Any) -> dict[str, str]:
        return headers_of(OpenAITarget.model_validate({"kind": "openai", "cluster": "auto"} | more))

    assert headers() == {"authorization": "Bearer sk-any"}
    assert headers(api_key_env="OTHER") == {"authorization": "Bearer sk-other"}
    assert headers(headers={"Authorization": "Basic x"}) == {"Authorization": "Basic x"}
    monkeypatch.delenv("OPENAI_API_KEY")
    assert headers() == {}
