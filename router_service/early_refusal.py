"""Refusals where requests arrive: what the ingress would refuse does not go as far.

A request that passes Ray Serve's proxy to be refused at the ingress takes time of both, which is missing where answers
are made on the same cores (docs/faults.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus

from starlette.middleware import Middleware

from expertmesh.metrics import Exporter
from router_service.error_shape import App, Message, Receive, Send
from router_service.metrics import PROXY_REFUSALS

API = "/v1/"
HOLD_S = 0.5
"""A refusal is believed for so long: other proxies' requests end meanwhile, and the limit may have changed."""


class EarlyRefusal:
    """ASGI middleware of a Serve proxy, which needs no settings: a 429 of the ingress tells how many requests of this
    proxy are too many. While as many are under way, the next ones get the same answer, from here."""

    def __init__(self, app: App, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock
        self._exporter = Exporter()
        self._under_way = 0
        self._too_many = 0
        self._until = float("-inf")
        self._refusal: list[Message] = []

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(API):
            await self._app(scope, receive, send)
        elif self._under_way >= self._too_many and self._clock() < self._until:
            if self._exporter.wanted:
                self._exporter.add(PROXY_REFUSALS, 1)
            for message in self._refusal:
                await send(dict(message))
        else:
            await self._pass(scope, receive, send)

    async def _pass(self, scope: Message, receive: Receive, send: Send) -> None:
        refusal: list[Message] = []
        ended = False

        async def note(message: Message) -> None:
            nonlocal ended
            if refusal or message.get("status") == HTTPStatus.TOO_MANY_REQUESTS:
                refusal.append(_without_request_id(message))
            if not ended and message["type"] == "http.response.body" and not message.get("more_body", False):
                ended = True  # the proxy itself notes it some time later
                self._end(refusal)
            await send(message)

        self._under_way += 1
        try:
            await self._app(scope, receive, note)
        finally:
            if not ended:
                self._end([])

    def _end(self, refusal: list[Message]) -> None:
        self._under_way -= 1
        if refusal:
            self._too_many, self._until, self._refusal = self._under_way, self._clock() + HOLD_S, refusal


def _without_request_id(message: Message) -> Message:
    if "headers" not in message:
        return dict(message)
    return {**message, "headers": [pair for pair in message["headers"] if bytes(pair[0]).lower() != b"x-request-id"]}


def middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(EarlyRefusal)]
