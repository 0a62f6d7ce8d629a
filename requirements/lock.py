"""Writes requirements/cpu.txt, every package of a CPU installation with the hashes of the files that pip may choose.

    python requirements/lock.py [--upgrade]

Needs `uv` on the PATH for the resolution. Versions stay as they are in cpu.txt unless `--upgrade` is given. torch is
apart, since a lock cannot say "this build or else that one": `make setup` takes the CPU build (torch-cpu.txt, kept by
hand: its wheels are not on the index that uv asks) where pip finds it, else the CUDA build with the libraries it links
(torch-cuda.txt), which runs on a CPU too.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
LOCK, CUDA_LOCK = FOLDER / "cpu.txt", FOLDER / "torch-cuda.txt"
MACHINES = ("x86_64", "aarch64")
PYTHONS = ("3.11", "3.12", "3.13")
TORCH_PACKAGES = ("torch", "cuda-", "nvidia-")
"""How the names of torch and of its CUDA libraries begin."""

Packages = dict[tuple[str, str], dict[str, set[str]]]
"""(name, version) -> machine -> sha256 of its files."""


def requirements() -> list[str]:
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
    native = tomllib.loads((FOLDER.parent / "native" / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    builds = [*project["build-system"]["requires"], *native["build-system"]["requires"]]
    return [*project["project"]["dependencies"], *extras["cpu"], *extras["dev"], *builds]


def resolve(folder: Path, machine: str, python: str, constraints: list[str]) -> Iterator[tuple[str, str, set[str]]]:
    """Name, version and hashes of every package that `machine` and `python` need."""
    wanted, lock = folder / "wanted.txt", folder / "pylock.toml"
    wanted.write_text("\n".join(requirements()))
    lock.unlink(missing_ok=True)
    command = [
        "uv",
        "pip",
        "compile",
        str(wanted),
        "--override",
        str(FOLDER / "overrides.txt"),
        *constraints,
        "--quiet",
    ]
    command += ["--python-platform", f"{machine}-manylinux_2_35", "--python-version", python]
    subprocess.run([*command, "--format", "pylock.toml", "--output-file", str(lock)], check=True)
    for package in tomllib.loads(lock.read_text())["packages"]:
        files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        yield package["name"], package["version"], {file["hashes"]["sha256"] for file in files}


def write(path: Path, packages: Packages) -> None:
    lines = ["# Written by requirements/lock.py; install with pip --no-deps --require-hashes"]
    for (name, version), machines in sorted(packages.items()):
        only = "" if len(machines) == len(MACHINES) else f' ; platform_machine == "{min(machines)}"'
        hashes = set().union(*machines.values())
        lines.append(
            " \\\n    ".join([f"{name}=={version}{only}", *(f"--hash=sha256:{one}" for one in sorted(hashes))])
        )
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    if not shutil.which("uv"):
        sys.exit("requirements/lock.py: uv is not on the PATH; install it with pip")
    packages: Packages = defaultdict(lambda: defaultdict(set))
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder, "constraints.txt")
        old.write_text(
            "".join(
                line for line in (LOCK.read_text() + CUDA_LOCK.read_text()).splitlines(True) if "==" in line
            ).replace("\\", "")
        )
        constraints = [] if "--upgrade" in sys.argv else ["--constraints", str(old)]
        for machine in MACHINES:
            for python in PYTHONS:
                for name, version, hashes in resolve(Path(folder), machine, python, constraints):
                    packages[name, version][machine] |= hashes
    versions = defaultdict(set)
    for name, version in packages:
        versions[name].add(version)
    if torn := sorted(name for name, found in versions.items() if len(found) > 1):
        sys.exit(f"requirements/lock.py: no single version of {', '.join(torn)} suits every Python and machine")
    write(LOCK, {key: found for key, found in packages.items() if not key[0].startswith(TORCH_PACKAGES)})
    write(CUDA_LOCK, {key: found for key, found in packages.items() if key[0].startswith(TORCH_PACKAGES)})
    print(f"{LOCK.name} and {CUDA_LOCK.name}: {len(packages)} packages")


if __name__ == "__main__":
    main()
