"""Error answers of the OpenAI API in one shape: OpenAI's, with one clean line, whoever in the stack made them."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

RETRY_AFTER_S = b"2"
# how Ray Serve LLM wraps vLLM's own message
WRAPPED = re.compile(r"^Message: (?P<message>.*?)(?: \(Request ID: [^)]*\))*, Internal exception: .*", re.DOTALL)


def openai_error(status: int, body: bytes) -> dict[str, Any]:
    """The body of an error answer, from whatever JSON or text stood there."""
    try:
        given = json.loads(body)
    except ValueError:
        given = body.decode(errors="replace")
    error = given.get("error", given.get("detail", given)) if isinstance(given, dict) else given
    facts = error if isinstance(error, dict) else {"message": error}
    message = str(facts.get("message") or HTTPStatus(status).phrase)
    wrapped = WRAPPED.match(message)
    if wrapped:
        message = wrapped["message"]
    kind = facts.get("type")
    if kind in (None, "OpenAIHTTPException"):
        kind = (
            "NotFoundError" if status == HTTPStatus.NOT_FOUND else "BadRequestError" if status < 500 else "ServerError"
        )
    line = re.sub(r"\s*\(Request ID: [^)]*\)", "", " ".join(message.split()))
    return {"error": {"message": line, "type": kind, "param": facts.get("param") or None, "code": status}}


class ErrorShape:
    """ASGI middleware; answers below 400 pass through untouched, chunk by chunk."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def reshape(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await _send_error(start, body, send)

        await self._app(scope, receive, reshape)


async def _send_error(start: Message, body: bytes, send: Send) -> None:
    content = json.dumps(openai_error(start["status"], body)).encode()
    replaced = (b"content-type", b"content-length", b"retry-after")
    headers = [pair for pair in start["headers"] if pair[0].lower() not in replaced]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if start["status"] == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", RETRY_AFTER_S))
    await send({**start, "headers": headers})
    await send({"type": "http.response.body", "body": content})
