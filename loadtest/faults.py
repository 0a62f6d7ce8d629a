"""Faults on a cluster of one's own: kill, hang, slow or cut off a replica, put a corrupt one beside it, restart what
stands beside; at once or on a schedule."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass

import psutil

from expertmesh.args import DIRECTORY_APPLICATION, DIRECTORY_DEPLOYMENT, ROUTER_APPLICATION, ROUTER_DEPLOYMENT
from expertmesh.cluster import processes
from expertmesh.cluster.processes import MARKER
from expertmesh.cluster.record import Record, load_deployed
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError, ConfigError, ExpertMeshError
from expertmesh.v1 import directory_pb2
from loadtest.config import Fault, RunConfig
from loadtest.corrupt_replica import SUFFIX, corrupt_replica
from loadtest.endpoint import Endpoint
from loadtest.partition import cut_off
from loadtest.records import FaultRecord
from loadtest.target import Clock

SLOW_PERIOD_S = 0.1
TITLES = {"controller": "ray::ServeController", "proxy": "ray::ProxyActor"}
"""Of processes that Ray 2.60 names so; Ray Serve's."""
DEPLOYMENTS = {
    "directory": (DIRECTORY_APPLICATION, DIRECTORY_DEPLOYMENT),
    "router": (ROUTER_APPLICATION, ROUTER_DEPLOYMENT),
}


class Injector:
    """Carries out a run's faults, each on a thread of its own; one that cannot be done is told, and the run goes on."""

    def __init__(self, config: RunConfig, endpoint: Endpoint) -> None:
        """Raises ConfigError where the cluster is not one that `up` started on this machine or lacks the group."""
        self._faults = config.faults
        self._cluster = endpoint.cluster
        if config.faults:
            self._cluster = own(endpoint.cluster)
            _check_groups(config, self._cluster)

    def start(self, clock: Clock, repeat: int) -> None:
        self._stop = threading.Event()
        self._done: list[FaultRecord] = []
        self._threads = [
            threading.Thread(target=self._run, args=(fault, clock, repeat), name="loadtest-fault", daemon=True)
            for fault in self._faults
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[FaultRecord]:
        """Ends faults that go on, drops faults that are not due yet; what was done, in order."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return sorted(self._done, key=lambda record: record.at_s)

    def _run(self, fault: Fault, clock: Clock, repeat: int) -> None:
        if self._stop.wait(max(0.0, fault.at_s - clock.now())) or self._cluster is None:
            return
        at_s, target, error = clock.now(), fault.group or "directory", ""
        try:
            victim = find_victim(fault, self._cluster)
            target = victim.name
            inflict(fault, victim, self._stop)
        except (ExpertMeshError, psutil.Error) as failure:
            error = str(failure)
        until_s = clock.now() if fault.for_s is not None and not error else None
        self._done.append(FaultRecord(repeat, at_s, fault.kind, target, until_s, error))


@dataclass(frozen=True)
class Victim:
    name: str
    """Id of a replica, or `directory`."""
    process: psutil.Process
    cluster: Record
    replica: directory_pb2.Replica | None = None
    """A replica's entry in the directory."""


def inflict(fault: Fault, victim: Victim, stop: threading.Event) -> int:
    """Returns when the fault is over or `stop` is set, with the process running: how many answers it corrupted.

    Raises psutil.Error if the process is gone, ClusterError where a partition is not allowed, and ConfigError or
    ClusterError where the cluster's config or its TLS files cannot be read for a corrupt replica, or its routers would
    not notice.
    """
    process = victim.process
    if fault.for_s is None:
        process.kill()
        return 0
    if fault.kind == "partition" and victim.replica is not None:
        with cut_off(int(victim.replica.address.rpartition(":")[2])):
            stop.wait(fault.for_s)
        return 0
    if fault.kind == "corrupt" and victim.replica is not None:
        config, directory = load_deployed(victim.cluster).config, victim.cluster.directory
        if fault.what == "checksum" and not config.engine.checksums:
            raise ConfigError("corrupt: checksum: without engine.checksums the wrong sums would be used")
        with corrupt_replica(victim.replica, fault.what, directory, config.security.tls, victim.cluster.tls) as made:
            stop.wait(fault.for_s)
        return made.answers
    ends_at = time.monotonic() + fault.for_s
    try:
        while time.monotonic() < ends_at and not stop.is_set():
            process.suspend()
            if fault.kind == "hang":
                stop.wait(fault.for_s)
                return 0
            stop.wait(SLOW_PERIOD_S * (1 - 1 / fault.factor))
            process.resume()
            stop.wait(SLOW_PERIOD_S / fault.factor)
    finally:
        if process.is_running():
            process.send_signal(signal.SIGCONT)
    return 0


def find_victim(fault: Fault, cluster: Record) -> Victim:
    """Whom the fault hits; raises ClusterError where it is not there or not the cluster's own."""
    replica = None
    if fault.group is None:
        target, pid = _restarted(fault, cluster)
    else:
        listed = list_table(cluster.directory, tls=cluster.tls).replicas
        replicas = [one for one in listed if one.group == fault.group and not one.replica_id.endswith(SUFFIX)]
        if fault.replica >= len(replicas):
            raise ClusterError(
                f"group {fault.group} has {len(replicas)} replicas now, none with number {fault.replica}"
            )
        replica = sorted(replicas, key=lambda one: one.replica_id)[fault.replica]
        target, pid = replica.replica_id, replica.pid
    if pid == os.getpid():
        raise ClusterError(f"{target} is the load test's own process")
    try:
        process = psutil.Process(pid)
        ours = process.environ().get(MARKER) == cluster.marker
    except (psutil.Error, OSError):
        raise ClusterError(f"{target}: process {pid} is not one of ours on this machine") from None
    if not ours:
        raise ClusterError(f"{target}: process {pid} was not started by `expertmesh up` for {cluster.name}")
    return Victim(target, process, cluster, replica)


def _restarted(fault: Fault, cluster: Record) -> tuple[str, int]:
    """Name and pid of a part that Ray or Ray Serve starts again when it ends."""
    what = fault.kind.removeprefix("restart_")
    if title := TITLES.get(what):
        pids = [process.pid for process in processes.running(cluster.marker or "") if _title(process) == title]
    else:
        application, deployment = DEPLOYMENTS[what]
        details = ServeApi(cluster.dashboard, cluster.token).details()
        found = details.get("applications", {}).get(application, {}).get("deployments", {}).get(deployment, {})
        replicas = sorted(found.get("replicas", []), key=lambda one: str(one["replica_id"]))
        pids = [int(replica["pid"]) for replica in replicas if replica.get("pid")]
    if fault.replica >= len(pids):
        raise ClusterError(f"the cluster has {len(pids)} of {what} now, none with number {fault.replica}")
    return what, pids[fault.replica]


def _title(process: psutil.Process) -> str:
    """By which Ray's workers call themselves, less the method that they are in."""
    try:
        return str((process.cmdline() or [""])[0]).strip().partition(".")[0]
    except psutil.Error:
        return ""


def own(cluster: Record | None) -> Record:
    """Raises ConfigError where no cluster is named or it was not started on this machine."""
    if cluster is None or cluster.marker is None:
        whose = f"cluster {cluster.name!r} was not started on this machine" if cluster else "no cluster is named"
        raise ConfigError(f"faults: {whose}; faults need one that `expertmesh up` started here")
    return cluster


def _check_groups(config: RunConfig, cluster: Record) -> None:
    known = {replica.group for replica in list_table(cluster.directory, tls=cluster.tls).replicas}
    for number, fault in enumerate(config.faults):
        if fault.group is not None and fault.group not in known:
            groups = ", ".join(sorted(known)) or "none"
            raise ConfigError(f"faults.{number}.group: the cluster has no group {fault.group!r} (groups: {groups})")
