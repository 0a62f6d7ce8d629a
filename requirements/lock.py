"""Writes requirements/cpu.txt, every package of a CPU installation with the hashes of the files that pip may choose.
The container images have locks of their own, in the versions of cpu.txt wherever it names a package: image-build.txt
(what builds the project), image-cpu.txt and image-gpu.txt (what runs it, nothing for development). So has what
`make fuzz-http` runs in a virtual environment of its own, schemathesis.txt: it does not fit cpu.txt.

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
IMAGE_PYTHONS = ("3.11",)
"""Of the images' Debian."""
TORCH_PACKAGES = ("torch", "cuda-", "nvidia-")
"""How the names of torch and of its CUDA libraries begin."""

CUDA = "cuda-python>=13,<14"
"""The CUDA that torch 2.13 is built for: left alone, the resolver takes an old one whose parts do not fit."""
LEFT_OUT = {"image-cpu": ("ninja", "opencv-python-headless", "triton")}
"""What text on a CPU does without: a build tool, images and videos, a gigabyte for GPUs."""
UNLIKE_CPU = {"image-gpu": ("apache-tvm-ffi", "triton")}
"""Where vLLM's GPU build, or the torch that it is built for, insists on a version of its own."""

Packages = dict[tuple[str, str], dict[str, set[str]]]
"""(name, version) -> machine -> sha256 of its files."""


def requirements() -> dict[str, list[str]]:
    """What each kind of installation asks for."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
    native = tomllib.loads((FOLDER.parent / "native" / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    builds = [*project["build-system"]["requires"], *native["build-system"]["requires"]]
    runs = project["project"]["dependencies"]
    return {
        "cpu": [*runs, *extras["cpu"], *extras["dev"], *builds],
        "image-build": [*builds, *(one for one in extras["dev"] if one.startswith(("cmake", "ninja")))],
        "image-cpu": [*runs, *extras["cpu"]],
        "image-gpu": [*runs, *extras["gpu"], CUDA],
        "schemathesis": ["schemathesis>=4.32"],
    }


def resolve(
    folder: Path, kind: str, machine: str, python: str, constraints: list[str]
) -> Iterator[tuple[str, str, set[str]]]:
    """Name, version and hashes of every package that `machine` and `python` need."""
    wanted, lock = folder / "wanted.txt", folder / "pylock.toml"
    wanted.write_text("\n".join(requirements()[kind]))
    overrides = folder / "overrides.txt"
    out = LEFT_OUT.get(kind, ())
    ours = ("#", *out, *UNLIKE_CPU.get(kind, ()))
    kept = [line for line in (FOLDER / "overrides.txt").read_text().splitlines() if not line.startswith(ours)]
    overrides.write_text("\n".join([*kept, *(f'{name} ; sys_platform == "never"' for name in out)]))
    lock.unlink(missing_ok=True)
    command = [
        "uv",
        "pip",
        "compile",
        str(wanted),
        "--override",
        str(overrides),
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


def pinned(*locks: Path) -> dict[str, str]:
    """Their packages as constraints, without the hashes, by name; of several versions the last."""
    lines = [line for lock in locks if lock.exists() for line in lock.read_text().splitlines() if "==" in line]
    return {line.split("==")[0]: line.replace("\\", "").strip() for line in lines}


def packages_of(kind: str, pythons: tuple[str, ...], constraints: dict[str, str]) -> Packages:
    """Of all machines and Pythons together; exits where they need different versions."""
    packages: Packages = defaultdict(lambda: defaultdict(set))
    with tempfile.TemporaryDirectory() as folder:
        constrained = Path(folder, "constraints.txt")
        constrained.write_text("\n".join(constraints.values()))
        for machine in MACHINES:
            for python in pythons:
                options = ["--constraints", str(constrained)]
                for name, version, hashes in resolve(Path(folder), kind, machine, python, options):
                    packages[name, version][machine] |= hashes
    versions = defaultdict(set)
    for name, version in packages:
        versions[name].add(version)
    if torn := sorted(name for name, found in versions.items() if len(found) > 1):
        sys.exit(f"requirements/lock.py: {kind}: no single version of {', '.join(torn)} suits every Python and machine")
    return packages


def main() -> None:
    if not shutil.which("uv"):
        sys.exit("requirements/lock.py: uv is not on the PATH; install it with pip")
    upgrade = "--upgrade" in sys.argv
    packages = packages_of("cpu", PYTHONS, {} if upgrade else pinned(LOCK, CUDA_LOCK))
    write(LOCK, {key: found for key, found in packages.items() if not key[0].startswith(TORCH_PACKAGES)})
    write(CUDA_LOCK, {key: found for key, found in packages.items() if key[0].startswith(TORCH_PACKAGES)})
    print(f"{LOCK.name} and {CUDA_LOCK.name}: {len(packages)} packages")
    for kind in ("image-build", "image-cpu", "image-gpu"):
        lock = FOLDER / f"{kind}.txt"
        ours = {name: line for name, line in pinned(LOCK).items() if name not in UNLIKE_CPU.get(kind, ())}
        packages = packages_of(kind, IMAGE_PYTHONS, ours if upgrade else pinned(lock) | ours)
        apart = TORCH_PACKAGES if kind == "image-cpu" else ()
        write(lock, {key: found for key, found in packages.items() if not key[0].startswith(apart)})
        print(f"{lock.name}: {len(packages)} packages")
    lock = FOLDER / "schemathesis.txt"
    packages = packages_of("schemathesis", PYTHONS, {} if upgrade else pinned(lock))
    write(lock, packages)
    print(f"{lock.name}: {len(packages)} packages")


if __name__ == "__main__":
    main()
