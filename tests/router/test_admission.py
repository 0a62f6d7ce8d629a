"""Who is let in when many come, or much: on the ASGI interface, where Ray Serve's proxy calls it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from router_service.admission import Admission


class Slow:
    """Answers once it is told to; reads the whole body first."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.bodies: list[int] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        self.bodies.append(size)
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})


async def ask(app: Any, path: str = "/v1/completions", body: tuple[bytes, ...] = (b"{}",), length: str = "") -> Any:
    """Status, headers and body of the answer to a body that comes in pieces."""
    pieces = [{"type": "http.request", "body": one, "more_body": True} for one in body]
    pieces.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[Any] = []

    async def receive() -> Any:
        return pieces.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", length.encode())] if length else []
    await app({"type": "http", "path": path, "headers": headers}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(one.get("body", b"") for one in sent[1:])


def test_more_than_the_most_get_429_until_some_are_answered() -> None:
    async def run() -> None:
        slow = Slow()
        app = Admission(slow, max_requests=3, max_body_bytes=100)
        waiting = [asyncio.create_task(ask(app)) for _ in range(3)]
        await asyncio.sleep(0)
        status, headers, body = await ask(app)
        assert (status, headers[b"retry-after"]) == (429, b"1")
        assert json.loads(body)["error"]["type"] == "RateLimitError"
        slow.go.set()
        assert [answer[0] for answer in await asyncio.gather(*waiting)] == [200] * 3
        assert app.under_way == 0
        assert (await ask(app))[0] == 200

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_get_through_when_nobody_else_does(path: str) -> None:
    async def run() -> None:
        slow = Slow()
        slow.go.set()
        app = Admission(slow, max_requests=0, max_body_bytes=100)
        assert (await ask(app, path))[0] == 200
        assert (await ask(app))[0] == 429

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "length"),
    [((b"x" * 101,), ""), ((b"x" * 60, b"x" * 60), ""), ((), "101"), ((), "9" * 5000), ((b"x" * 200,), "nonsense")],
)
def test_bodies_beyond_the_bound_get_413_and_are_forgotten(body: tuple[bytes, ...], length: str) -> None:
    async def run() -> None:
        slow = Slow()
        slow.go.set()
        app = Admission(slow, max_requests=1, max_body_bytes=100)
        status, _, answer = await ask(app, body=body, length=length)
        assert status == 413 and "100 bytes" in json.loads(answer)["error"]["message"]
        assert slow.bodies == [] and app.under_way == 0
        assert (await ask(app, body=(b"x" * 100,), length="100"))[0] == 200

    asyncio.run(run())


def test_a_caller_that_breaks_off_makes_room() -> None:
    async def run() -> None:
        slow = Slow()
        app = Admission(slow, max_requests=1, max_body_bytes=100)
        task = asyncio.create_task(ask(app))
        await asyncio.sleep(0)
        assert app.under_way == 1
        task.cancel()
        await asyncio.wait([task])
        assert app.under_way == 0

    asyncio.run(run())
