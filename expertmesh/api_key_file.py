"""Adding keys to a file of API keys, and taking them out: what `expertmesh api-key` does."""

from __future__ import annotations

import datetime
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from expertmesh.api_keys import ApiKey, digest, is_name, new_key, parse, read_text
from expertmesh.errors import ConfigError

HEADING = "# API keys of expertmesh: name, SHA-256 of the key, date of creation. Made by `expertmesh api-key`.\n"


def create(path: Path, name: str | None) -> tuple[ApiKey, str]:
    """Adds a key to the file, made where it is missing, and returns it: the only time that it is known.

    Raises ConfigError, and changes nothing, where the name is taken or the file is not one of keys.
    """
    if name is not None and not is_name(name):
        raise ConfigError("no name of a key: it has at most 63 letters, digits and ._@-, a letter or digit first")
    key, added = new_key(), None

    def add(text: str) -> str:
        nonlocal added
        taken = {one.name for one in parse(text, str(path))}
        if name in taken:
            raise ConfigError(f"{path}: has a key {name!r} already; revoke it first, or choose another --name")
        chosen = name or next(free for number in range(1, len(taken) + 2) if (free := f"key-{number}") not in taken)
        added = ApiKey(chosen, digest(key.encode()), datetime.datetime.now(datetime.UTC).date())
        before = text if not text or text.endswith("\n") else f"{text}\n"
        return f"{before or HEADING}{added.line}\n"

    _rewrite(path, add, may_be_missing=True)
    assert added is not None
    return added, key


def revoke(path: Path, name: str) -> None:
    """Takes a key out of the file; raises ConfigError, and changes nothing, where it is not there."""

    def drop(text: str) -> str:
        if name not in {one.name for one in parse(text, str(path))}:
            raise ConfigError(f"{path}: has no key {name!r}" if is_name(name) else f"{path}: has no key of that name")
        return "".join(line for line in text.splitlines(keepends=True) if line.split()[:1] != [name])

    _rewrite(path, drop, may_be_missing=False)


def _rewrite(path: Path, change: Callable[[str], str], *, may_be_missing: bool) -> None:
    """Replaces the file at once by what `change` makes of its text; others who do the same wait."""
    target = Path(os.path.realpath(path))
    try:
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            absent = may_be_missing and not target.exists()
            _replace(target, change("" if absent else read_text(path)))
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def _replace(target: Path, text: str) -> None:
    """Owner and mode stay; a new file is its owner's alone."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            if target.exists():
                before, made = target.stat(), os.fstat(file.fileno())
                if (before.st_uid, before.st_gid) != (made.st_uid, made.st_gid):
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), before.st_mode & 0o777)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
