"""What can be said of docker/ without building it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kubernetes_testbed import tool

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


@pytest.mark.kubernetes
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([tool("hadolint"), DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_bases_are_pinned() -> None:
    text = DOCKERFILE.read_text()
    stages = set(re.findall(r"^FROM .* AS (\S+)$", text, re.MULTILINE))
    outside = {name for name in re.findall(r"^FROM (\S+)", text, re.MULTILINE) if name not in stages | {"scratch"}}
    assert outside == {"${BASE_IMAGE}@${BASE_DIGEST}"}
    assert "\nARG BASE_DIGEST\n" in text, "it has no default"
    assert {"cpu", "gpu"} <= stages


def test_all_that_is_copied_is_sent_and_exists() -> None:
    sent = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert Path(source).parts[0] in sent, source


def test_every_installed_package_has_its_hash() -> None:
    for lock in ("image-build", "image-cpu", "image-gpu"):
        entries = re.split(r"\n(?=\S)", (ROOT / "requirements" / f"{lock}.txt").read_text())[1:]
        assert len(entries) > 10
        assert all("==" in one and "--hash=sha256:" in one for one in entries), lock
    assert DOCKERFILE.read_text().count("--require-hashes") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cpu", "--engine-less"], "unrecognized arguments"),
        (["tpu"], "invalid choice"),
        (["cpu", "--base", "debian:bookworm-slim"], "@sha256:"),
    ],
)
def test_the_tool_refuses_what_it_cannot_build(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "docker").chmod(0o755)
    command = [sys.executable, str(ROOT / "docker" / "build.py"), *arguments]
    environment = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("target", "configured", "found"),
    [
        ("cpu", {}, "extra-index-url = https://download.pytorch.org/whl/cpu"),
        ("gpu", {}, ""),
        ("cpu", {"PIP_INDEX_URL": "https://pypi.example.com/simple"}, "index-url = https://pypi.example.com/simple"),
        ("cpu", {"PIP_EXTRA_INDEX_URL": "file:///x https://a/simple"}, "extra-index-url = https://a/simple"),
        (
            "gpu",
            {"PIP_USER": "1", "PIP_PROXY": "http://proxy:3128", "PIP_CONSTRAINT": "x"},
            "proxy = http://proxy:3128",
        ),
        ("cpu", {"PIP_FIND_LINKS": "WHEELS"}, ""),
    ],
)
def test_where_the_build_finds_torch(tmp_path: Path, target: str, configured: dict[str, str], found: str) -> None:
    """pip's configuration as it becomes the build's secret."""
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").write_bytes(b"")
    (tmp_path / "made").mkdir()
    program = f"import build, pathlib; build.pip_options({target!r}, pathlib.Path({str(tmp_path / 'made')!r}))"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    told = {key: value.replace("WHEELS", str(tmp_path)) for key, value in configured.items()}
    environment = kept | told | {"PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": str(ROOT / "docker")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert (tmp_path / "made" / "pip.conf").read_text().split("\n")[1:-1] == ([found] if found else [])
    assert any((tmp_path / "made" / "wheels").iterdir()) == ("PIP_FIND_LINKS" in configured)
