"""Admission at the ingress: more requests than the routers can answer in good time, or larger ones, go no further."""

from __future__ import annotations

import json
from http import HTTPStatus

from router_service.error_shape import App, Message, Receive, Send, openai_error

OPEN_PATHS = frozenset({"/health", "/metrics"})
"""Of probes and scrapers, which must get through when nobody else does."""
RETRY_AFTER_S = 1


class Admission:
    """ASGI middleware: at most `max_requests` at once get through, the others a 429; bodies of more than
    `max_body_bytes` get a 413, before they are read where they say their length."""

    def __init__(self, app: App, max_requests: int, max_body_bytes: int) -> None:
        self._app = app
        self._max_requests = max_requests
        self._max_body_bytes = max_body_bytes
        self.under_way = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
        elif self.under_way >= self._max_requests:
            message = f"{self.under_way} requests are under way, the most that are admitted; try again later"
            retry = [(b"retry-after", str(RETRY_AFTER_S).encode())]
            await _refuse(send, HTTPStatus.TOO_MANY_REQUESTS, "RateLimitError", message, retry)
        else:
            self.under_way += 1
            try:
                await self._admit(scope, receive, send)
            finally:
                self.under_way -= 1

    async def _admit(self, scope: Message, receive: Receive, send: Send) -> None:
        body = Body(receive, self._max_body_bytes)
        started = False

        async def note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            body.check(_declared_bytes(scope))
            await self._app(scope, body.receive, note)
        except TooLarge as error:
            if started:
                raise
            await _refuse(send, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "BadRequestError", str(error), [])


class TooLarge(Exception):
    """A request's body has more bytes than are read."""


class Body:
    """Counts what is received."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._bytes = 0

    def check(self, total: int) -> None:
        if total > self._max_bytes:
            raise TooLarge(f"the request's body has more than {self._max_bytes:,} bytes")

    async def receive(self) -> Message:
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        self.check(self._bytes)
        return message


def _declared_bytes(scope: Message) -> int:
    """What the header says; 0 where it says nothing that is a number, which is found out while reading."""
    for name, value in scope["headers"]:
        if name.lower() == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0


async def _refuse(send: Send, status: HTTPStatus, kind: str, message: str, headers: list[tuple[bytes, bytes]]) -> None:
    error = json.dumps({"error": {"message": message, "type": kind}}).encode()
    content = json.dumps(openai_error(status, error)).encode()
    plain = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": int(status), "headers": [*plain, *headers]})
    await send({"type": "http.response.body", "body": content})
