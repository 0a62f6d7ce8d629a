"""Builds a container image of docker/Dockerfile with docker, podman or buildah, and prints its name and size.

    tools/image [cpu|gpu] [--tag NAME] [--base NAME@sha256:DIGEST | --stand-in] [--engine ENGINE]

Where no image registry is reached, `--stand-in` builds with buildah on a base made of Debian's packages by debootstrap,
under the real base's name. As pip is configured to reach an index here (address, proxy, certificates, wheels in a
`find-links` folder), so it does in the build, through secrets and a build context of which nothing stays in the image.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stand_in import make_stand_in

ROOT = Path(__file__).parent.parent
DEFAULT_BASE = "docker.io/library/debian:bookworm-slim"
ENGINES = ("docker", "podman", "buildah")
HOW = (
    f"give the base's digest: --base {DEFAULT_BASE}@sha256:..., which "
    f"`docker buildx imagetools inspect {DEFAULT_BASE}` or `skopeo inspect docker://{DEFAULT_BASE}` prints; "
    "or build on a --stand-in"
)
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Of torch's CPU build, for who has configured no index: it is on no other public one."""
KEPT_KEYS = ("default-timeout", "proxy", "retries", "timeout", "trusted-host")
"""Of pip's configuration, as it is: how an index is reached. The rest (`install.user`) is of this machine."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/image", description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="?", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--tag", help="name of the image; default: expertmesh:TARGET")
    parser.add_argument("--base", help="NAME@sha256:DIGEST of the base image")
    parser.add_argument("--engine", choices=ENGINES, help="default: the first that is installed")
    parser.add_argument("--stand-in", action="store_true", help="buildah, on a base made here with debootstrap")
    parser.add_argument("--storage", type=Path, help="buildah's storage; default: its own")
    given = parser.parse_args()
    tag = given.tag or f"expertmesh:{given.target}"
    wanted = ("buildah",) if given.stand_in else (given.engine,) if given.engine else ENGINES
    engine = [one for one in wanted if shutil.which(one)][:1]
    if not engine:
        fail(f"{' or '.join(wanted)} is not installed")
    if given.stand_in and not shutil.which("debootstrap"):
        fail("--stand-in needs debootstrap, which is not installed (Debian: buildah debootstrap runc)")
    if engine == ["buildah"] and given.storage:
        engine += ["--root", str(given.storage / "root"), "--runroot", str(given.storage / "run")]
    began = time.monotonic()
    base = make_stand_in(engine, DEFAULT_BASE) if given.stand_in else given.base
    if not base or "@sha256:" not in base:
        fail(HOW)
    with tempfile.TemporaryDirectory(prefix="expertmesh-image-") as folder:
        build(engine, given.target, tag, base, given.stand_in, Path(folder))
    mib = size_bytes(engine, tag) / 2**20
    on = f"{'a stand-in for ' if given.stand_in else ''}{base.partition('@')[0]}"
    print(f"{tag}: {mib:,.0f} MiB, built in {time.monotonic() - began:.0f} s by {engine[0]} on {on}")


def build(engine: list[str], target: str, tag: str, base: str, stand_in: bool, folder: Path) -> None:
    """Exits where the engine fails."""
    name, _, digest = base.partition("@")
    arguments = {"BASE_IMAGE": name, "BASE_DIGEST": digest, "VERSION": version(), "REVISION": revision()}
    command = [*engine, "build", "--file", str(ROOT / "docker" / "Dockerfile"), "--target", target, "--tag", tag]
    command += [part for key, value in arguments.items() for part in ("--build-arg", f"{key}={value}")]
    command += pip_options(target, folder)
    environment = os.environ.copy()
    if engine[0] == "docker":
        command += ["--load"]  # a builder in a container of its own keeps what it builds otherwise
    if engine[0] == "buildah":
        command += ["--layers=false", "--force-rm", *(["--pull-never"] if stand_in else [])]
        # needs no namespaces of its own, which machines without a container engine may not allow
        environment.setdefault("BUILDAH_ISOLATION", "chroot")
    if subprocess.run([*command, str(ROOT)], env=environment, check=False, stdout=sys.stderr).returncode:
        fail(f"{engine[0]} could not build {tag}")


def pip_options(target: str, folder: Path) -> list[str]:
    """Secrets and the context `wheels`, made in `folder` from pip's configuration here."""
    found = pip_configuration()
    lines = [f"{key} = {found[key]}" for key in KEPT_KEYS if key in found]
    indexes = {key: reachable(found.get(key, "")) for key in ("index-url", "extra-index-url")}
    wheels = folder / "wheels"
    wheels.mkdir()
    for place in map(Path, found.get("find-links", "").split()):
        for wheel in place.glob("torch-*.whl") if place.is_dir() else ():
            shutil.copy(wheel, wheels)
    if target == "cpu" and not any(indexes.values()) and not any(wheels.iterdir()):
        indexes["extra-index-url"] = [TORCH_CPU_INDEX]
    lines += [f"{key} = {' '.join(places)}" for key, places in indexes.items() if places]
    options = ["--build-context", f"wheels={wheels}"]
    if "cert" in found:
        options += ["--secret", f"id=ca.crt,src={found['cert']}"]
        lines.append("cert = /run/secrets/ca.crt")
    configuration = folder / "pip.conf"
    configuration.touch(mode=0o600)
    configuration.write_text("\n".join(["[global]", *lines, ""]))
    return [*options, "--secret", f"id=pip.conf,src={configuration}"]


def reachable(places: str) -> list[str]:
    """Those of pip's indexes that are no files of this machine."""
    return [one for one in places.split() if "://" in one and not one.startswith("file:")]


def pip_configuration() -> dict[str, str]:
    """What files and the environment say, the environment last."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    pairs = [line.split("=", 1) for line in listed.splitlines() if "=" in line]
    ordered = sorted(pairs, key=lambda pair: pair[0].startswith(":env:"))
    return {key.rsplit(".", 1)[-1]: " ".join(str(ast.literal_eval(value)).split()) for key, value in ordered}


def size_bytes(engine: list[str], tag: str) -> int:
    """Of the unpacked layers."""
    if engine[0] != "buildah":
        command = [*engine, "image", "inspect", "--format", "{{.Size}}", tag]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    mounter = subprocess.run([*engine, "from", "--pull-never", tag], capture_output=True, text=True, check=True)
    container = mounter.stdout.strip()
    count = ["sh", "-c", 'du -sxB1 "$MOUNTED"']
    try:
        if os.geteuid():  # who is not root sees an image's files in a user namespace alone
            command, environment = [*engine, "unshare", "--mount", f"MOUNTED={container}", *count], os.environ.copy()
        else:
            mounted = subprocess.run([*engine, "mount", container], capture_output=True, text=True, check=True).stdout
            command, environment = count, os.environ | {"MOUNTED": mounted.strip()}
        counted = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        return int(counted.split()[0])
    finally:
        subprocess.run([*engine, "rm", container], stdout=subprocess.DEVNULL, check=False)


def version() -> str:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version = "))


def revision() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def fail(problem: str) -> None:
    sys.exit(f"tools/image: {problem}")


if __name__ == "__main__":
    main()
