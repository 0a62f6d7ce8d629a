"""What a Serve proxy refuses itself, on the ASGI interface: behind it stands the ingress's own admission."""

from __future__ import annotations

import asyncio
from typing import Any

from test_admission import Slow, ask

from router_service.admission import Admission
from router_service.early_refusal import HOLD_S, EarlyRefusal


class Counted:
    """How many requests come through."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.passed = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.passed += 1

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"X-Request-ID", str(self.passed).encode())]
            await send(message)

        await self._app(scope, receive, named)


class Proxy:
    """Before an ingress that admits three; `now` is its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slow = Slow()
        self.ingress = Counted(Admission(self.slow, max_requests=3, max_body_bytes=100))
        self.app = EarlyRefusal(self.ingress, lambda: self.now)
        self.waiting: list[asyncio.Task[Any]] = []

    async def fill(self, app: Any) -> None:
        self.waiting = [asyncio.create_task(ask(app)) for _ in range(3)]
        await asyncio.sleep(0)

    async def end(self) -> list[int]:
        self.slow.go.set()
        return [answer[0] for answer in await asyncio.gather(*self.waiting)]


def test_what_the_ingress_has_refused_goes_no_further_than_the_proxy() -> None:
    async def run() -> None:
        proxy = Proxy()
        await proxy.fill(proxy.app)
        first = await ask(proxy.app)
        assert first[0] == 429 and first[1][b"X-Request-ID"] == b"4"
        for _ in range(10):
            status, headers, body = await ask(proxy.app)
            assert (status, body, headers[b"retry-after"]) == (429, first[2], b"1")
            assert b"X-Request-ID" not in headers
        assert proxy.ingress.passed == 4
        assert await proxy.end() == [200] * 3
        assert (await ask(proxy.app))[0] == 200  # at once, within the time

    asyncio.run(run())


def test_a_refusal_is_believed_for_a_while_only() -> None:
    async def run() -> None:
        proxy = Proxy()
        await proxy.fill(proxy.ingress)  # from another proxy
        assert [(await ask(proxy.app))[0] for _ in range(2)] == [429, 429]
        assert proxy.ingress.passed == 4
        assert await proxy.end() == [200] * 3
        proxy.now = HOLD_S
        assert (await ask(proxy.app))[0] == 200

    asyncio.run(run())


def test_other_paths_and_other_errors_go_through() -> None:
    async def run() -> None:
        proxy = Proxy()
        await proxy.fill(proxy.app)
        assert (await ask(proxy.app))[0] == 429
        passed = proxy.ingress.passed
        task = asyncio.create_task(ask(proxy.app, "/health"))
        await asyncio.sleep(0)
        assert proxy.ingress.passed == passed + 1
        assert await proxy.end() == [200] * 3
        assert (await task)[0] == 200
        large = await ask(proxy.app, length="1000")
        assert large[0] == 413
        assert (await ask(proxy.app, length="1000"))[0] == 413 and proxy.ingress.passed == passed + 3

    asyncio.run(run())


def test_a_caller_that_goes_away_is_not_under_way_any_more() -> None:
    async def run() -> None:
        proxy = Proxy()
        await proxy.fill(proxy.app)
        assert (await ask(proxy.app))[0] == 429
        proxy.waiting.pop().cancel()
        await asyncio.sleep(0)
        task = asyncio.create_task(ask(proxy.app))
        await asyncio.sleep(0)
        assert await proxy.end() == [200] * 2
        assert (await task)[0] == 200

    asyncio.run(run())
