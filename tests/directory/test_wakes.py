from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from expertmesh.directory.wakes import MAX_UNDER_WAY, Wakes
from expertmesh.errors import ClusterError


class Groups:
    """Counts who is woken; a wake ends when the test says so."""

    def __init__(self) -> None:
        self.woken: list[str] = []
        self.ended: list[str] = []
        self.answer = asyncio.Event()
        self.error: ClusterError | None = None

    async def wake(self, group: str) -> None:
        self.woken.append(group)
        try:
            if self.error:
                raise self.error
            await self.answer.wait()
        finally:
            self.ended.append(group)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_a_group_is_woken_once_until_its_replica_came() -> None:
    async def test() -> None:
        groups = Groups()
        wakes = Wakes(groups.wake)
        assert all(wakes.ask("g") for _ in range(5))
        await turn()
        assert groups.woken == ["g"]
        wakes.came("g")
        await turn()
        assert groups.ended == ["g"]
        assert wakes.ask("g"), "a second has not passed"
        await turn()
        assert groups.woken == ["g"]
        await asyncio.sleep(1.05)
        assert wakes.ask("g")
        await turn()
        assert groups.woken == ["g", "g"]
        wakes.came("g")

    run(test)


def test_wakes_under_way_are_bounded() -> None:
    async def test() -> None:
        groups = Groups()
        wakes = Wakes(groups.wake)
        assert [wakes.ask(f"g{number}") for number in range(MAX_UNDER_WAY + 3)].count(False) == 3
        await turn()
        assert len(groups.woken) == MAX_UNDER_WAY
        groups.answer.set()
        await turn()
        assert wakes.ask("other")

    run(test)


def test_a_wake_that_fails_or_takes_too_long_may_be_asked_again() -> None:
    async def test() -> None:
        groups = Groups()
        wakes = Wakes(groups.wake, given_up_after_s=0.05)
        assert wakes.ask("slow")
        groups.error = ClusterError("no such application")
        assert wakes.ask("gone")
        groups.error = None
        await asyncio.sleep(0.01)
        groups.error = ClusterError("no such application")
        assert wakes.ask("gone2")
        await turn()
        assert groups.ended.count("gone2") == 1
        groups.error = None
        while "slow" not in groups.ended:
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.05)
        assert wakes.ask("slow") and wakes.ask("gone2")
        await turn()
        assert groups.woken.count("slow") == groups.woken.count("gone2") == 2
        groups.answer.set()
        await turn()

    run(test)
