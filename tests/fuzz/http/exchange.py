"""One request with its answer: read from what schemathesis recorded, or sent once more to another server."""

from __future__ import annotations

import base64
import http.client
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

LIMIT_S = 20.0
"""How long a whole answer may take."""
NOT_SENT_AGAIN = frozenset({"host", "connection", "content-length", "x-schemathesis-testcaseid", "accept-encoding"})
STREAM = "text/event-stream"


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    """Path and query, as sent."""
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True)
class Answer:
    status: int
    """Of the response, or of the error that a stream ended with; 0 where nothing came within LIMIT_S."""
    message: str = ""
    """The error's, where there is one."""


@dataclass(frozen=True)
class Exchange:
    request: Request
    answer: Answer

    @property
    def failed(self) -> bool:
        return self.answer.status == 0 or self.answer.status >= 500


def recorded(har: Any) -> list[Exchange]:
    """All of an HTTP archive whose bodies are in base64."""
    return [Exchange(_request(entry["request"]), _answer(entry["response"])) for entry in har["log"]["entries"]]


def _request(given: Any) -> Request:
    url = urlsplit(given["url"])
    target = url.path + (f"?{url.query}" if url.query else "")
    headers = tuple((header["name"], header["value"]) for header in given["headers"])
    return Request(given["method"], target, headers, base64.b64decode(given.get("postData", {}).get("text", "")))


def _answer(given: Any) -> Answer:
    kinds = [header["value"] for header in given["headers"] if header["name"].lower() == "content-type"]
    return answer_of(given["status"], "".join(kinds[:1]), base64.b64decode(given["content"].get("text") or ""))


def answer_of(status: int, kind: str, body: bytes) -> Answer:
    """Of a response with that status, content type and whole body."""
    text = body.decode(errors="replace")
    if status >= 400:
        error = next(_errors([text]), {})
        return Answer(status, str(error.get("message", "")))
    if kind.startswith(STREAM):
        events = (line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: "))
        for error in _errors(events):
            code = error.get("code")
            return Answer(code if isinstance(code, int) else 500, str(error.get("message", "")))
    return Answer(status)


def _errors(texts: Any) -> Iterator[dict[str, Any]]:
    for text in texts:
        try:
            given = json.loads(text)
        except ValueError:
            continue
        if isinstance(given, dict) and isinstance(given.get("error"), dict):
            yield given["error"]


def send(url: str, request: Request) -> Answer:
    """The same bytes to another server."""
    where = urlsplit(url)
    deadline = time.monotonic() + LIMIT_S
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=LIMIT_S)
    try:
        connection.putrequest(request.method, request.target, skip_accept_encoding=True)
        for name, value in request.headers:
            if name.lower() not in NOT_SENT_AGAIN:
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(request.body)))
        connection.endheaders(request.body)
        response = connection.getresponse()
        body = b""
        while piece := response.read1():
            body += piece
            if time.monotonic() > deadline:
                return Answer(0)
        return answer_of(response.status, response.getheader("content-type", ""), body)
    except (OSError, http.client.HTTPException):
        return Answer(0)
    finally:
        connection.close()


def route(target: str, routes: list[str]) -> str:
    """Which of a schema's paths a target is of, or its path."""
    path = urlsplit(target).path
    for one in sorted(routes, key=lambda text: ("{" in text, text)):
        if re.fullmatch(re.sub(r"\\\{[^}]*\\\}", ".*", re.escape(one)), path):
            return one
    return path
