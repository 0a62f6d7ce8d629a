"""One leader among several candidates, by a Lease of coordination.k8s.io/v1.

The algorithm is that of client-go's leaderelection package: a candidate takes over only once it has itself seen the
same record for the record's whole duration, on its own monotonic clock, so that clocks need not agree; every write
depends on the version that was read. The official Python client has a counterpart (37.0), which never gives a lease
back, ends on a connection that breaks and does not tell the work that it must stop; so this is our own.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import urllib3
from kubernetes.client import ApiException, CoordinationV1Api

from expertmesh.errors import ClusterError
from expertmesh.kubernetes.connection import Connection
from expertmesh.kubernetes.refusals import Conflict, NotThere, Unreachable, refusal

logger = logging.getLogger(__name__)
RESOURCE = "leases.coordination.k8s.io"
T = TypeVar("T")


@dataclass(frozen=True)
class Times:
    """Seconds. Kubernetes' own controllers use these."""

    lease_s: int = 15
    """Whole seconds after the last renewal in which nobody else takes over."""
    renew_s: float = 10
    """A leader that could not renew for so long stops leading."""
    retry_s: float = 2
    """Between two attempts to take or to renew."""

    def __post_init__(self) -> None:
        if not 0 < self.retry_s < self.renew_s < self.lease_s:
            raise ValueError(f"retry {self.retry_s} < renew {self.renew_s} < lease {self.lease_s} does not hold")


@dataclass(frozen=True)
class Record:
    """What a Lease says; empty where it was given back."""

    holder: str
    lease_s: int
    acquired_at: str
    renewed_at: str
    transitions: int
    """How often the leader changed."""
    version: str = ""
    """Of the object; empty where there is none yet."""


@dataclass(frozen=True)
class Seen:
    """A record and when this process first saw it, on its monotonic clock."""

    record: Record
    at: float


def may_lead(seen: Seen, identity: str, now: float) -> bool:
    """Whether to write oneself into the record: it is one's own, given back, or out of date."""
    record = seen.record
    return record.holder in ("", identity) or now >= seen.at + record.lease_s


def next_record(record: Record, identity: str, lease_s: int, stamp: str) -> Record:
    """As `identity` writes it; the time of acquisition stays where it leads already."""
    if record.holder == identity:
        return replace(record, renewed_at=stamp, lease_s=lease_s)
    taken = record.transitions + 1 if record.version else 0
    return Record(identity, lease_s, stamp, stamp, taken, record.version)


class Leadership:
    """What the leader's work looks at: it must stop soon once this is lost."""

    def __init__(self) -> None:
        self._lost = threading.Event()

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleeps, or wakes and says True as soon as it is lost."""
        return self._lost.wait(seconds)

    def lose(self) -> None:
        self._lost.set()


class Candidate:
    """One of those who may lead. Errors of the API server are raised as ClusterError."""

    def __init__(
        self, connection: Connection, namespace: str, name: str, identity: str, times: Times | None = None
    ) -> None:
        """`identity` differs from that of every other process, such as the pod's name."""
        self.identity = identity
        self.times = times or Times()
        self._namespace, self._name = namespace, name
        self._url = connection.url
        self._api = CoordinationV1Api(connection.api)
        self._seen: Seen | None = None

    @property
    def leads(self) -> bool:
        """As far as this process has seen."""
        return self._seen is not None and self._seen.record.holder == self.identity

    def try_to_lead(self) -> bool:
        """One attempt to take or renew the lease; False where another leads, or was faster."""
        record = self._read()
        now = time.monotonic()
        if self._seen is None or self._seen.record != record:
            self._seen = Seen(record, now)
        if not may_lead(self._seen, self.identity, now):
            return False
        try:
            written = self._write(next_record(record, self.identity, self.times.lease_s, _stamp()))
        except Conflict:
            return False
        self._seen = Seen(written, now)
        return True

    def give_back(self) -> None:
        """So that another can lead at once; nothing where this does not lead, or the API server does not answer."""
        try:
            record = self._read()
            if record.holder == self.identity:
                # client-go writes one second too, since 0 is not allowed
                self._write(replace(record, holder="", lease_s=1, renewed_at=_stamp()))
        except ClusterError as error:
            logger.info("lease %s/%s: not given back: %s", self._namespace, self._name, error)

    def _read(self) -> Record:
        try:
            return _record(self._ask("get", self._api.read_namespaced_lease, self._name, self._namespace))
        except NotThere:
            return Record("", 0, "", "", 0)

    def _write(self, record: Record) -> Record:
        body = {
            "metadata": {"name": self._name, "resourceVersion": record.version or None},
            "spec": {
                "holderIdentity": record.holder,
                "leaseDurationSeconds": record.lease_s,
                "acquireTime": record.acquired_at or None,
                "renewTime": record.renewed_at or None,
                "leaseTransitions": record.transitions,
            },
        }
        if not record.version:
            return _record(self._ask("create", self._api.create_namespaced_lease, self._namespace, body))
        return _record(self._ask("update", self._api.replace_namespaced_lease, self._name, self._namespace, body))

    def _ask(self, verb: str, call: Callable[..., T], *arguments: Any) -> T:
        try:
            # so that a silent server does not keep a leader from noticing in time
            return call(*arguments, _request_timeout=self.times.renew_s / 2)
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            raise refusal(error, f"{verb} {RESOURCE}", self._namespace, self._url) from None


def run_as_leader(
    candidate: Candidate,
    work: Callable[[Leadership], T],
    say: Callable[[str], None] = logger.info,
    beat: Callable[[], None] = lambda: None,
) -> T:
    """Waits until this process leads, runs `work` in the calling thread, and gives the lease back when it returns.
    `beat` is called at every attempt to lead.

    Work that returns because its leadership was lost runs again once it leads again. Raises ClusterError where the API
    server refuses to let it be a candidate, which waiting does not change.
    """
    while True:
        say(f"{candidate.identity} waits to lead")
        _wait_to_lead(candidate, say, beat)
        say(f"{candidate.identity} leads")
        leadership, done = Leadership(), threading.Event()
        renewing = threading.Thread(target=_renew, args=(candidate, leadership, done, say), daemon=True)
        renewing.start()
        try:
            result = work(leadership)
        finally:
            done.set()
            renewing.join()
            if not leadership.lost:
                candidate.give_back()
        if not leadership.lost:
            return result
        say(f"{candidate.identity} leads no more")


def _wait_to_lead(candidate: Candidate, say: Callable[[str], None], beat: Callable[[], None]) -> None:
    while True:
        beat()
        try:
            if candidate.try_to_lead():
                return
        except Unreachable as error:
            say(str(error))
        time.sleep(candidate.times.retry_s * random.uniform(1.0, 1.2))


def _renew(candidate: Candidate, leadership: Leadership, done: threading.Event, say: Callable[[str], None]) -> None:
    """Until done, or until the lease is another's or could not be renewed in time."""
    renewed_at = time.monotonic()
    while not done.wait(candidate.times.retry_s):
        try:
            if candidate.try_to_lead():
                renewed_at = time.monotonic()
                continue
            problem = "others write to the lease"
        except ClusterError as error:
            problem = str(error)
        if not candidate.leads or time.monotonic() - renewed_at > candidate.times.renew_s:
            say(f"{candidate.identity} could not renew: {problem}")
            leadership.lose()
            return


def _record(lease: Any) -> Record:
    spec = lease.spec
    return Record(
        holder=spec.holder_identity or "",
        lease_s=spec.lease_duration_seconds or 0,
        acquired_at=_stamp(spec.acquire_time) if spec.acquire_time else "",
        renewed_at=_stamp(spec.renew_time) if spec.renew_time else "",
        transitions=spec.lease_transitions or 0,
        version=lease.metadata.resource_version,
    )


def _stamp(at: datetime | None = None) -> str:
    """MicroTime, always with six digits, which the API server insists on."""
    return (at or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
