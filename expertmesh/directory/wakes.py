"""Waking groups that sleep: at most once a second each, and not while one that was begun may still succeed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from expertmesh.errors import ExpertMeshError

logger = logging.getLogger(__name__)

EVERY_S = 1.0
GIVEN_UP_AFTER_S = 60.0
MAX_UNDER_WAY = 64

Wake = Callable[[str], Awaitable[None]]
"""Wakes a group and returns once one of its replicas has answered; raises ExpertMeshError where that cannot be."""


class Wakes:
    """All methods run on one event loop."""

    def __init__(self, wake: Wake, given_up_after_s: float = GIVEN_UP_AFTER_S) -> None:
        self._wake = wake
        self._given_up_after_s = given_up_after_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._begun_at: dict[str, float] = {}

    def ask(self, group: str) -> bool:
        """Whether the group is being woken from now on, or was already."""
        if group in self._tasks:
            return True
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._begun_at = {name: at for name, at in self._begun_at.items() if now - at < EVERY_S}
        if group in self._begun_at:
            return True
        if len(self._tasks) >= MAX_UNDER_WAY:
            return False
        self._begun_at[group] = now
        self._tasks[group] = asyncio.create_task(self._run(group))
        return True

    def came(self, group: str) -> None:
        """A replica of the group is there."""
        if (task := self._tasks.pop(group, None)) is not None:
            task.cancel()

    async def _run(self, group: str) -> None:
        logger.info("group %s: rows wait for it; waking it", group)
        try:
            async with asyncio.timeout(self._given_up_after_s):
                await self._wake(group)
        except TimeoutError:
            logger.warning("group %s: no replica within %.0f s of waking it", group, self._given_up_after_s)
        except ExpertMeshError as error:
            logger.warning("group %s: not woken: %s", group, error)
        finally:
            if self._tasks.get(group) is asyncio.current_task():
                del self._tasks[group]
