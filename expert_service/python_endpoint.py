"""A replica's endpoint in Python: grpc.aio on an event loop of its own, batcher and runtime."""

from __future__ import annotations

import time

from expert_service.batcher import Batcher
from expert_service.endpoint import Offer, Streams
from expert_service.executor import Executor
from expert_service.load import LoadMeter
from expert_service.runtime import Answer, Runtime
from expert_service.server import ExpertServer, LoopThread
from expert_service.service import ExpertServicer
from expertmesh.v1 import expert_pb2 as pb


class PythonEndpoint:
    """Raises ConfigError where a file of `tls` cannot serve."""

    def __init__(self, offer: Offer, executor: Executor) -> None:
        self._offer = offer
        served = offer.served
        self._batcher = Batcher(offer.max_queued_rows, served.max_rows)
        self._meter = LoadMeter({layer: len(held) for layer, held in served.held.items()}, time.monotonic())
        self._runtime = Runtime(self._batcher, executor, self._meter, self._deliver, offer.num_threads)
        self._servicer = ExpertServicer(offer.description, served, self._batcher, self._describe, self._runtime.load)
        self._server = ExpertServer(self._servicer, offer.tls)
        self._state: pb.ReplicaState.ValueType = pb.REPLICA_STATE_STARTING
        self._thread = LoopThread("expert-server")
        self._runtime.start()

    @property
    def executor(self) -> Executor:
        return self._runtime.executor

    @executor.setter
    def executor(self, executor: Executor) -> None:
        self._runtime.executor = executor

    def listen(self, host: str, ports: tuple[int, int] | None) -> str:
        return self._thread.run(self._server.start(host, ports))

    def set_state(self, state: pb.ReplicaState.ValueType) -> None:
        self._state = state
        self._thread.run(self._server.set_serving(state == pb.REPLICA_STATE_READY))

    def load(self) -> pb.Load:
        return self._runtime.load()

    def expert_rows(self) -> dict[int, list[int]]:
        return self._meter.expert_rows()

    def queue_wait(self) -> tuple[int, int]:
        return self._runtime.queue_wait()

    def streams(self) -> Streams:
        streams = tuple(self._servicer.streams)
        return Streams(
            count=len(streams),
            waiting=sum(stream.waiting for stream in streams),
            open_rows=max((stream.open_rows for stream in streams), default=0),
        )

    def last_request_at(self) -> float:
        return self._servicer.last_request_at

    def problem(self) -> str | None:
        if not self._thread.alive:
            return "the server's thread has ended"
        if not self._runtime.alive:
            return "the executor's thread has ended"
        return None

    def close(self, timeout_s: float) -> None:
        self._batcher.close()
        self._runtime.join(timeout_s)

    def stop(self, grace_s: float) -> None:
        if self._thread.alive:
            self._thread.run(self._stop(grace_s))
            self._thread.stop()

    async def _stop(self, grace_s: float) -> None:
        for stream in tuple(self._servicer.streams):
            stream.end()
        await self._server.stop(grace_s)

    def _deliver(self, answers: list[Answer]) -> None:
        self._thread.loop.call_soon_threadsafe(_answer_all, answers)

    def _describe(self) -> pb.DescribeResponse:
        told = pb.DescribeResponse(state=self._state, load=self._runtime.load())
        told.MergeFrom(self._offer.description)
        return told


def _answer_all(answers: list[Answer]) -> None:
    for caller, response, rows in answers:
        caller.answer(response, rows)
