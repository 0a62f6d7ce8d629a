"""API keys and the file that holds their hashes: what the ingress and `expertmesh api-key` share.

A key is `em-` and 256 random bits in 43 characters. Its plain SHA-256 is kept: slow, salted hashes protect passwords,
which can be guessed; nobody guesses 256 random bits, or makes tables of them, and a check may cost a microsecond.

A file has one key per line, `NAME SHA256 CREATED`; lines that begin with # are comments.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from expertmesh.errors import ConfigError

PREFIX = "em-"
RANDOM_BYTES = 32
VARIABLE = "OPENAI_API_KEY"
MAX_FILE_BYTES = 2**20
KEY = re.compile(rb"em-[A-Za-z0-9_-]{43}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ApiKey:
    """What is kept of one key."""

    name: str
    sha256: str
    created: datetime.date

    @property
    def line(self) -> str:
        return f"{self.name} {self.sha256} {self.created.isoformat()}"


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(RANDOM_BYTES)


def is_name(text: str) -> bool:
    """A key itself is none: names are shown and logged."""
    return NAME.fullmatch(text) is not None and not KEY.fullmatch(text.encode())


def digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def admits(key: bytes, hashes: Collection[str]) -> bool:
    """Whether `key` is one of those hashed; the time it takes does not depend on which one, or how near."""
    if not KEY.fullmatch(key):
        return False
    given, found = digest(key), False
    for one in hashes:
        found |= hmac.compare_digest(given, one)
    return found


def parse(text: str, where: str) -> list[ApiKey]:
    """The keys of a file; raises ConfigError naming the line, and not what stands there, which might be a key."""
    keys: list[ApiKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key = _parse_line(line)
        if key is None:
            raise ConfigError(f"{where}:{number}: is not NAME SHA256 DATE, as `expertmesh api-key create` writes it")
        if any(key.name == one.name for one in keys):
            raise ConfigError(f"{where}:{number}: key {key.name!r} stands twice")
        keys.append(key)
    return keys


def _parse_line(line: str) -> ApiKey | None:
    parts = line.split()
    if len(parts) != 3 or not is_name(parts[0]) or not SHA256.fullmatch(parts[1]):
        return None
    try:
        return ApiKey(parts[0], parts[1], datetime.date.fromisoformat(parts[2]))
    except ValueError:
        return None


def read(path: Path) -> list[ApiKey]:
    """Raises ConfigError with one line where the file cannot be read or understood."""
    return parse(read_text(path), str(path))


def client_key() -> str | None:
    """The key that clients send, from the environment; raises ConfigError where it cannot stand in a header."""
    key = os.environ.get(VARIABLE) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{VARIABLE}: holds a character that no API key has")
    return key


def read_text(path: Path) -> str:
    """Raises ConfigError with one line."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; not a file of API keys")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not text in UTF-8") from None
