"""The client processes of a run: on this machine, or as actors all over a Ray cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from expertmesh.child_process import spawn
from expertmesh.errors import ClusterError
from loadtest.client import Job, Report
from loadtest.client_process import Begin, Done, Failed, Ready, Stop, Told, work

READY_TIMEOUT_S = 120.0
POLL_S = 0.1
CONNECT_TIMEOUT_S = 5.0


class Member(Protocol):
    """One client process."""

    def send(self, order: Begin | Stop) -> None: ...

    def receive(self) -> list[Told]:
        """What it has said since; Failed where it has died without a word."""
        ...

    def close(self) -> None:
        """Ends it, whatever it does."""
        ...


Launch = Callable[[Job], Member]


class LocalMember:
    def __init__(self, job: Job) -> None:
        self._process, self._connection = spawn(work, job, name=f"loadtest-{job.shard}")

    def send(self, order: Begin | Stop) -> None:
        # one that has died is told of by the next receive
        with contextlib.suppress(OSError):
            self._connection.send(order)

    def receive(self) -> list[Told]:
        return _all_of(self._connection, lambda: f"exit code {self._process.exitcode}")

    def close(self) -> None:
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()


class ActorBody:
    """Inside a Ray actor: the same work on a thread, its pipe reached by calls."""

    def __init__(self, job: Job) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._error = "its thread ended"
        self._thread = threading.Thread(target=self._work, args=(theirs, job), daemon=True)
        self._thread.start()

    def _work(self, connection: Connection, job: Job) -> None:
        try:
            work(connection, job)
        finally:
            connection.close()

    def send(self, order: Begin | Stop) -> None:
        self._connection.send(order)

    def receive(self) -> list[Told]:
        return _all_of(self._connection, lambda: self._error)


class RayMember:
    """An actor of one CPU; Ray spreads them over the nodes."""

    def __init__(self, job: Job) -> None:
        import ray

        self._ray = ray
        self._actor: Any = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(ActorBody).remote(job)

    def send(self, order: Begin | Stop) -> None:
        self._actor.send.remote(order)

    def receive(self) -> list[Told]:
        try:
            found: list[Told] = self._ray.get(self._actor.receive.remote(), timeout=READY_TIMEOUT_S)
        except self._ray.exceptions.RayError as error:
            return [Failed(f"its actor died: {str(error).splitlines()[0]}")]
        return found

    def close(self) -> None:
        self._ray.kill(self._actor)


class Fleet:
    """All client processes of one repeat."""

    def __init__(self, jobs: Sequence[Job], launch: Launch) -> None:
        """Returns when all are ready; raises ClusterError where one is not."""
        self._members: dict[int, Member] = {}
        self.done: set[int] = set()
        """Shards that have ended their work."""
        try:
            for job in jobs:
                self._members[job.shard] = launch(job)
            self._wait_ready()
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return len(self._members)

    def send(self, order: Begin | Stop) -> None:
        for member in self._members.values():
            member.send(order)

    def receive(self) -> list[tuple[int, Ready | Report | Done]]:
        """Shards with what they say, after a little while where none says a word; raises ClusterError where one has
        failed."""
        found: list[tuple[int, Ready | Report | Done]] = []
        for shard, member in self._members.items():
            for told in [] if shard in self.done else member.receive():
                if isinstance(told, Failed):
                    raise ClusterError(f"client process {shard}: {told.message}")
                if isinstance(told, Done):
                    self.done.add(shard)
                found.append((shard, told))
        if not found:
            time.sleep(POLL_S)
        return found

    def close(self) -> None:
        for member in self._members.values():
            member.close()

    def _wait_ready(self) -> None:
        waiting, until_s = set(self._members), time.monotonic() + READY_TIMEOUT_S
        while waiting:
            waiting -= {shard for shard, told in self.receive() if isinstance(told, Ready)}
            if time.monotonic() > until_s:
                raise ClusterError(f"client process {min(waiting)}: not ready within {READY_TIMEOUT_S:g} s")


def _all_of(connection: Connection, how_it_ended: Callable[[], str]) -> list[Told]:
    found: list[Told] = []
    try:
        while connection.poll():
            found.append(connection.recv())
    except (EOFError, OSError):
        found = found or [Failed(f"it died ({how_it_ended()})")]
    return found


def launcher(ray_address: str | None) -> Launch:
    """Where client processes are to run; raises ClusterError where Ray cannot be reached."""
    if ray_address is None:
        return LocalMember
    import ray

    _check_listening(ray_address)
    try:
        ray.init(address=ray_address, log_to_driver=False, ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(f"Ray at {ray_address}: {str(error).splitlines()[0]}") from None
    return RayMember


def _check_listening(ray_address: str) -> None:
    """Ray itself would try an address where nobody listens for minutes."""
    host, _, port = ray_address.rpartition("/")[2].rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"Ray at {ray_address}: {str(error).lower()}") from None
