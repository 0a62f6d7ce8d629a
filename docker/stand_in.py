"""A stand-in for the base image: Debian's packages, put together by debootstrap as the real one's are."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
SOURCES = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
UNUSED = ("usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man", "var/cache/apt", "var/lib/apt/lists")
SLIM = "".join(f"path-exclude /{path}/*\n" for path in UNUSED[:4])
"""What the slim images of Debian leave out, and leave out of packages that are installed later."""


def make_stand_in(buildah: list[str], name: str) -> str:
    """Makes it where it is missing, tagged `name`; returns name@digest. Exits where a command fails."""
    if (digest := digest_of(buildah, name)) is None:
        print(f"making a stand-in for {name} with debootstrap", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="expertmesh-base-") as folder:
            root = Path(folder, "root")
            run("debootstrap", "--variant=minbase", SUITE, str(root), mirror())
            slim_down(root)
            container = run(*buildah, "from", "scratch")
            try:
                run(*buildah, "add", "--quiet", container, str(root), "/")
                run(*buildah, "config", "--cmd", "bash", container)
                run(*buildah, "commit", "--quiet", container, name)
            finally:
                run(*buildah, "rm", container)
        digest = digest_of(buildah, name)
    return f"{name}@{digest}"


def slim_down(root: Path) -> None:
    """With the sources of packages that this machine has, so that the build gets the same updates."""
    for path in UNUSED:
        run("find", str(root / path), "-mindepth", "1", "-delete")
    (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(SLIM)
    for source in SOURCES:
        if source.exists():
            (root / "etc/apt/sources.list").unlink(missing_ok=True)
            (root / source.relative_to("/")).write_text(source.read_text())
            return


def mirror() -> str:
    """The one that this machine uses, where it is a Debian of the same suite."""
    lines = "\n".join(source.read_text() for source in SOURCES if source.exists()).splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    return next(iter(re.findall(r"https?://\S+/debian(?=[\s/])", text)), MIRROR) if SUITE in text else MIRROR


def digest_of(buildah: list[str], name: str) -> str | None:
    command = [*buildah, "inspect", "--type", "image", "--format", "{{.FromImageDigest}}", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"tools/image: {' '.join(command[:3])} ... failed")
    return done.stdout.strip()
