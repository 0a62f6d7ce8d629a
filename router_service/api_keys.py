"""API keys at the ingress: who shows none of them gets no further."""

from __future__ import annotations

import json
import logging
import time
from http import HTTPStatus
from pathlib import Path

from expertmesh import api_keys
from expertmesh.errors import ConfigError
from router_service.error_shape import App, Message, Receive, Send, openai_error

OPEN_PATHS = frozenset({"/health", "/metrics"})
"""Asked by probes and scrapers, which have no key. Ray Serve's proxy answers its own /-/healthz and /-/routes."""
POLICY_VIOLATION = 1008
"""WebSocket's code for a peer that is not wanted."""
SETTLED_S = 2.0
"""A file changed this recently may change again without another time stamp."""
REFUSAL = "No valid API key was given: it is expected in the header `Authorization: Bearer KEY`."

NOBODY = "none, nobody gets in"

log = logging.getLogger(__name__)

Version = tuple[int, int, int, int, int]


class KeyFile:
    """The hashes of a file, read again when it changes, also when a symbolic link to it is swapped.

    What cannot be read or understood leaves the last good keys in force. A file without keys lets nobody in.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hashes: tuple[str, ...] = ()
        self._seen: Version | None = None
        self._said = ""

    def hashes(self) -> tuple[str, ...]:
        """One `stat` while nothing changes."""
        try:
            version, settled = self._version()
        except OSError as error:
            self._seen = None
            self._warn(f"{self._path}: {(error.strerror or str(error)).lower()}")
            return self._hashes
        if version == self._seen:
            return self._hashes
        self._seen = version if settled else None
        try:
            self._hashes = tuple(key.sha256 for key in api_keys.read(self._path))
        except ConfigError as error:
            self._warn(str(error))
        else:
            level = logging.INFO if self._hashes else logging.WARNING
            self._say(level, f"{self._path}: API keys: {len(self._hashes) or NOBODY}")
        return self._hashes

    def _version(self) -> tuple[Version, bool]:
        found = self._path.stat()
        version = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        return version, abs(time.time() - found.st_ctime) > SETTLED_S

    def _warn(self, problem: str) -> None:
        kept = f"the {len(self._hashes)} read before stay in force" if self._hashes else NOBODY
        self._say(logging.WARNING, f"API keys: {kept}: {problem}")

    def _say(self, level: int, line: str) -> None:
        """Once, however often it is found."""
        if line != self._said:
            self._said = line
            log.log(level, "%s", line)


class ApiKeys:
    """ASGI middleware: requests with a key that the file knows pass, without the key; all others get a 401."""

    def __init__(self, app: App, path: Path) -> None:
        self._app = app
        self._file = KeyFile(path)
        self._file.hashes()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        elif self._admits(scope):
            # nobody behind this needs the key, and what does not have it cannot log it
            await self._app({**scope, "headers": _without_key(scope)}, receive, send)
        else:
            await _refuse(send)

    def _admits(self, scope: Message) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and api_keys.admits(key.strip(b" "), self._file.hashes())


def _without_key(scope: Message) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in scope["headers"] if name.lower() != b"authorization"]


async def _refuse(send: Send) -> None:
    error = {"error": {"message": REFUSAL, "type": "AuthenticationError"}}
    content = json.dumps(openai_error(HTTPStatus.UNAUTHORIZED, json.dumps(error).encode())).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": int(HTTPStatus.UNAUTHORIZED), "headers": headers})
    await send({"type": "http.response.body", "body": content})
