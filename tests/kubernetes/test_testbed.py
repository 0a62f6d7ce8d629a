"""What becomes of the tests where there is no API server to be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from kubernetes_testbed import CHECKOUT, REQUIRED

TEST = """
from kubernetes_testbed import api_server

def test_first(api_server): ...
def test_second(api_server): ...
"""


def outcome(folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Of two tests in a checkout that has no ../shared beside it."""
    tests = folder / "checkout/tests"
    tests.mkdir(parents=True, exist_ok=True)
    shutil.copy(CHECKOUT / "tests/kubernetes_testbed.py", tests)
    (tests / "test_it.py").write_text(TEST)
    own = {key: value for key, value in os.environ.items() if key not in (REQUIRED, "PYTHONPATH")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tests), str(tests)]
    done = subprocess.run(command, env=own | environment, cwd=tests, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_they_are_skipped_where_nobody_promised_one(tmp_path: Path) -> None:
    code, said = outcome(tmp_path, {})
    assert code == 0 and "2 skipped" in said


def test_make_e2e_kubernetes_fails(tmp_path: Path) -> None:
    shown = subprocess.run(["make", "-n", "e2e-kubernetes"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    (line,) = (one for one in shown.stdout.splitlines() if "-m pytest" in one)
    name, _, value = line.split()[0].partition("=")
    code, said = outcome(tmp_path, {name: value})
    assert code == 1 and "skipped" not in said
    assert sum("../shared, with the API server's build script" in one for one in said.splitlines()) == 1
