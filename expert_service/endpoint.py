"""The part of a replica that callers reach: a gRPC server, queues and the executor's thread; native or Python."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from expert_service.executor import Executor
from expert_service.request import Served
from expertmesh.errors import ConfigError
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.tls import TlsFiles

log = logging.getLogger(__name__)

NATIVE_MODULE = "expertmesh_native"


@dataclass(frozen=True)
class Offer:
    """What a replica serves and within which limits; does not change while it lives."""

    description: pb.DescribeResponse
    """All of it but state and load."""
    served: Served
    max_queued_rows: int
    num_threads: int
    tls: TlsFiles | None = None

    @property
    def replica_id(self) -> str:
        return self.description.replica_id


@dataclass(frozen=True)
class Streams:
    """The Dispatch streams of this moment."""

    count: int
    waiting: int
    """Requests that are not answered yet."""
    open_rows: int
    """Rows of the requests whose answers are not sent yet, in the stream that has most."""


def prepare_executor_thread(num_threads: int) -> None:
    """Called on the thread that computes. As a batch task it never preempts whoever woke it: a router on the same core
    writes to the other replicas first."""
    torch.set_num_threads(num_threads)  # OpenMP keeps it per thread
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class Endpoint(Protocol):
    """Serves from `listen` on; `close` then `stop` end it. Methods may be called on any thread."""

    executor: Executor
    """Runs on a thread of the endpoint's own, one batch after another."""

    def listen(self, host: str, ports: tuple[int, int] | None) -> str:
        """Serves on the first free port of the range, or on any; returns host:port. Raises ClusterError if none is
        free."""
        ...

    def set_state(self, state: pb.ReplicaState.ValueType) -> None:
        """What Describe says; health is SERVING while it is READY."""
        ...

    def load(self) -> pb.Load: ...

    def expert_rows(self) -> dict[int, list[int]]:
        """MoE layer -> rows computed for each of its experts so far."""
        ...

    def queue_wait(self) -> tuple[int, int]:
        """Median and 95th percentile of how long requests waited in the queue, of those taken in the last 5 to 6 s;
        microseconds, within 6.25 %. Where some wait and none was taken for a second, at least the oldest one's wait."""
        ...

    def streams(self) -> Streams: ...

    def last_request_at(self) -> float:
        """Seconds of the monotonic clock; 0 or less: none came yet."""
        ...

    def problem(self) -> str | None:
        """What has stopped working, or None."""
        ...

    def close(self, timeout_s: float) -> None:
        """Refuses what still comes, and waits up to the timeout until what waits has been computed."""
        ...

    def stop(self, grace_s: float) -> None:
        """Ends all streams, and cancels the calls that are not over after the grace."""
        ...


def make_endpoint(offer: Offer, executor: Executor, transport: Literal["auto", "native", "python"]) -> Endpoint:
    """Native where that is wanted or installed; raises ConfigError where it is wanted and absent."""
    installed = importlib.util.find_spec(NATIVE_MODULE) is not None
    if transport == "native" and not installed:
        raise ConfigError("transport: native is asked for, but expertmesh-native is not installed")
    native = installed and transport != "python"
    log.info("replica %s: %s server", offer.replica_id, "native" if native else "Python")
    # each imports what the other can do without
    if native:
        from expert_service.native_endpoint import NativeEndpoint

        return NativeEndpoint(offer, executor)
    from expert_service.python_endpoint import PythonEndpoint

    return PythonEndpoint(offer, executor)
