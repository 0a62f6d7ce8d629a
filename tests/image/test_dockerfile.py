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
