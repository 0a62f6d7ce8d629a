"""The directory's calls, whatever carries them: a gRPC server of its own or Ray Serve's proxy."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Collection
from typing import Any, Protocol

from expertmesh.directory.decisions import STALLED_AFTER_S, Decisions
from expertmesh.directory.expert_load import ExpertLoads
from expertmesh.directory.registry import Registry
from expertmesh.directory.wakes import EVERY_S, Wakes
from expertmesh.errors import ClusterError, WireError
from expertmesh.v1 import directory_pb2 as pb

logger = logging.getLogger(__name__)

LOADS_INTERVAL_S = 1.0
HEARTBEAT_S = 2.0
"""A watcher that has heard nothing for some of these may take the directory for gone."""
MAX_WANTED = 65_536


class Applications(Protocol):
    """Who runs the groups' replicas."""

    async def wake(self, group: str) -> None:
        """Has a replica of a group without any started; returns once it is there. Raises ClusterError where there is
        no such group."""
        ...

    async def replicas(self) -> dict[str, int]:
        """Group -> replicas that run or start, of all groups that exist. Raises ClusterError where that is not
        known."""
        ...


class Directory:
    """All methods run on one event loop. Without `applications` no group is woken."""

    def __init__(self, applications: Applications | None = None, stalled_after_s: float = STALLED_AFTER_S) -> None:
        self.watchers = 0
        """Watches that are open."""
        self.loads = ExpertLoads()
        self.registry = Registry(uuid.uuid4().hex[:12], time.monotonic(), self.loads.withdraw)
        self.decisions = Decisions(stalled_after_s)
        self._applications = applications
        self._wakes = Wakes(self._wake_group)
        self._asked_at = float("-inf")
        """When `applications` were last asked who sleeps."""
        self._changed: asyncio.Event | None = None

    def announce(self, request: pb.AnnounceRequest) -> pb.AnnounceResponse:
        """Raises WireError where the entry is of no use."""
        now, version = time.monotonic(), self.registry.version
        self.registry.announce(request.replica, request.lease_ms, now)
        self.loads.announce(request.replica, request.expert_rows, now)
        if self.registry.version != version and request.replica.group in self.registry.groups():
            self._wakes.came(request.replica.group)
        self._notify(version)
        return pb.AnnounceResponse(directory_id=self.registry.directory_id)

    def withdraw(self, request: pb.WithdrawRequest) -> pb.WithdrawResponse:
        version = self.registry.version
        self.registry.withdraw(request.replica_id)
        self._notify(version)
        return pb.WithdrawResponse()

    def list(self) -> pb.Table:
        return self.registry.table(time.monotonic())

    async def watch(self) -> AsyncGenerator[pb.Table, None]:
        """The table now, at once after each change of membership or state, and otherwise when loads have changed or
        a heartbeat is due."""
        self.watchers += 1
        try:
            while True:
                table = self.list()
                loads = self.registry.loads_revision
                sent_at = time.monotonic()
                yield table
                while not due(self.registry, table, loads, sent_at, time.monotonic()):
                    await self._wait(sent_at)
        finally:
            self.watchers -= 1

    def expert_load(self, request: pb.ExpertLoadRequest) -> pb.ExpertLoadReply:
        """Raises WireError where the window is none."""
        now = time.monotonic()
        self.registry.expire(now)
        return self.loads.reply(request.window_s, now)

    async def want(self, request: pb.WantRequest) -> pb.WantResponse:
        """Wakes every group without a replica that holds one of the experts. Where no group is known to hold an expert,
        as after a restart of the directory, all that sleep are woken."""
        if len(request.experts) > MAX_WANTED:
            raise WireError(f"{len(request.experts)} experts are wanted; more than {MAX_WANTED} cannot be")
        self.registry.expire(time.monotonic())
        live, holders = self.registry.groups(), self.registry.holders(request.layer, request.experts)
        asleep = {group for group in holders if group not in live}
        if set(request.experts) - set().union(*holders.values()):
            asleep |= await self._asleep() - live
        if self._applications is None:
            return pb.WantResponse(groups=sorted(asleep))
        return pb.WantResponse(groups=[group for group in sorted(asleep) if self._wakes.ask(group)])

    def report_decision(self, decision: pb.ScalingDecision) -> pb.ReportDecisionResponse:
        """Raises WireError where the decision is of no use."""
        self.decisions.report(decision, time.monotonic())
        return pb.ReportDecisionResponse()

    def scaling(self) -> pb.ScalingReply:
        now = time.monotonic()
        self.registry.expire(now)
        self._expect(self.registry.groups(), now)
        return self.decisions.reply(now)

    def _expect(self, live: Collection[str], now: float) -> None:
        self.decisions.expire(live, now)
        if self._applications is not None:
            self.decisions.expect(live, now)

    async def health(self) -> dict[str, Any]:
        """`status`: "ok", or "stalled" where the autoscaler of some groups has been silent or failing for too long;
        `stalled`: these groups; `groups`: the last decision for each."""
        groups = (await self.scaling_of_existing()).groups
        stalled = [one.last.group for one in groups if one.stalled]
        return {
            "status": "stalled" if stalled else "ok",
            "stalled": stalled,
            "groups": {
                one.last.group: {
                    "target": one.last.target,
                    "reason": one.last.reason,
                    "error": one.last.error,
                    "since_success_s": round(one.since_success_s, 1),
                    "stalled": one.stalled,
                }
                for one in groups
            },
        }

    async def scaling_of_existing(self) -> pb.ScalingReply:
        """As of the time of the call, without groups that do not exist: nobody decides for these any more, so that
        before one is called stalled, that is asked."""
        now = time.monotonic()
        await self._forget_removed(now)
        return self.decisions.reply(now)

    async def _forget_removed(self, now: float) -> None:
        self.registry.expire(now)
        live = self.registry.groups()
        self._expect(live, now)
        silent = [group for group in self.decisions.stalled(now) if group not in live]
        if not silent or self._applications is None:
            return
        try:
            existing = await self._applications.replicas()
        except ClusterError as error:
            logger.warning("which groups exist is not known: %s", error)
            return
        for group in silent:
            if group not in existing:
                self.decisions.forget(group)
                self.registry.forget(group)

    async def _asleep(self) -> set[str]:
        """Groups that exist but have no replica; asked once a second at most."""
        now = time.monotonic()
        if self._applications is None or now - self._asked_at < EVERY_S:
            return set()
        self._asked_at = now
        try:
            return {group for group, replicas in (await self._applications.replicas()).items() if not replicas}
        except ClusterError as error:
            logger.warning("which groups sleep is not known: %s", error)
            return set()

    async def _wake_group(self, group: str) -> None:
        assert self._applications is not None
        try:
            await self._applications.wake(group)
        except ClusterError:
            self.registry.forget(group)
            raise

    async def _wait(self, sent_at: float) -> None:
        """Until something may be due."""
        if self._changed is None:
            self._changed = asyncio.Event()
        now = time.monotonic()
        until = min(self.registry.next_change_at(now), now + LOADS_INTERVAL_S, sent_at + HEARTBEAT_S)
        try:
            async with asyncio.timeout(max(0.001, until - now)):
                await self._changed.wait()
        except TimeoutError:
            return

    def _notify(self, version: int) -> None:
        if self.registry.version != version and self._changed is not None:
            self._changed.set()
            self._changed = None


def due(registry: Registry, sent: pb.Table, sent_loads: int, sent_at: float, now: float) -> bool:
    """Whether a watcher to whom `sent` went at `sent_at`, with the loads of revision `sent_loads`, gets a new table."""
    registry.expire(now)
    if registry.version != sent.version or registry.settling(now) != sent.settling:
        return True
    silent_s = now - sent_at
    return silent_s >= HEARTBEAT_S or (silent_s >= LOADS_INTERVAL_S and registry.loads_revision != sent_loads)
