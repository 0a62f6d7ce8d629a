"""A replica's endpoint in C++ (`expertmesh_native.Server`): Python sees whole batches and nothing smaller."""

from __future__ import annotations

import functools
import logging
import threading
from typing import Protocol, runtime_checkable

import expertmesh_native
import torch
from google.protobuf.message import DecodeError
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2

from expert_service.endpoint import Offer, Streams, prepare_executor_thread
from expert_service.executor import Executor, Pairs
from expert_service.server import SERVICE
from expertmesh.errors import ClusterError
from expertmesh.experts import format_indices
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.channel import SERVER_OPTIONS
from expertmesh.wire.tensors import DTYPES, WIRE_DTYPES
from expertmesh.wire.tls import CurrentTls

logger = logging.getLogger(__name__)

REFLECTED = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
MAX_WINDOWS = 256


@runtime_checkable
class NativeRun(Protocol):
    """An executor whose batches the server computes without Python."""

    @property
    def computation(self) -> expertmesh_native.Computation:
        """Gives the sums that `run` gives."""
        ...


class NativeEndpoint:
    """Raises ConfigError where a file of `tls` cannot serve."""

    def __init__(self, offer: Offer, executor: Executor) -> None:
        self._hidden_size = offer.served.hidden_size
        self._num_threads = offer.num_threads
        tls = CurrentTls(offer.tls) if offer.tls else None
        self._server = expertmesh_native.Server(
            replica_id=offer.replica_id,
            group=offer.description.group,
            fingerprint=offer.description.fingerprint,
            hidden_size=offer.served.hidden_size,
            held={layer: held.tobytes() for layer, held in offer.served.held.items()},
            layers_text=format_indices(set(offer.served.held)),
            max_rows=offer.served.max_rows,
            max_pairs=offer.served.max_pairs,
            max_queued_rows=offer.max_queued_rows,
            max_batch_rows=offer.served.max_rows,
            description=offer.description.SerializeToString(),
            reflect=_reflect,
            options=SERVER_OPTIONS,
            tls=functools.partial(_pem, tls) if tls else None,
        )
        self._thread = threading.Thread(target=self._loop, name="expert-executor", daemon=True)
        self.executor = executor

    @property
    def executor(self) -> Executor:
        return self._executor

    @executor.setter
    def executor(self, executor: Executor) -> None:
        self._executor = executor
        self._server.compute_with(executor.computation if isinstance(executor, NativeRun) else None)

    def listen(self, host: str, ports: tuple[int, int] | None) -> str:
        port = self._server.listen(host, *(ports or (0, 0)))
        if not port and ports:
            raise ClusterError(f"replica: every port from {ports[0]} to {ports[1]} is in use on {host}")
        if not port:
            raise ClusterError(f"replica: cannot listen on {host}")
        self._thread.start()
        return f"{host}:{port}"

    def set_state(self, state: pb.ReplicaState.ValueType) -> None:
        self._server.set_serving(state == pb.REPLICA_STATE_READY)  # first: who is told the state relies on its health
        self._server.set_state(state)

    def load(self) -> pb.Load:
        queued_rows, busy, rows_total, rows_per_s = self._server.load()
        return pb.Load(queued_rows=queued_rows, busy=busy, rows_total=rows_total, rows_per_s=rows_per_s)

    def expert_rows(self) -> dict[int, list[int]]:
        return self._server.expert_rows()

    def queue_wait(self) -> tuple[int, int]:
        return self._server.queue_wait()

    def streams(self) -> Streams:
        waiting, count, open_rows = self._server.streams()
        return Streams(count, waiting, open_rows)

    def last_request_at(self) -> float:
        return self._server.last_request_at()

    def problem(self) -> str | None:
        return None if self._thread.is_alive() else "the executor's thread has ended"

    def close(self, timeout_s: float) -> None:
        self._server.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def stop(self, grace_s: float) -> None:
        self._server.stop(grace_s)

    def _loop(self) -> None:
        prepare_executor_thread(self._num_threads)
        server, window = self._server, _Window(self._server, self._hidden_size)
        while (taken := server.take()) is not None:
            layer, rows, pairs, dtype, version = taken
            hidden_states, columns = window.show(rows, pairs, dtype, version)
            try:
                output = self.executor.run(layer, hidden_states, columns).contiguous()
                if output.shape != hidden_states.shape:
                    raise ValueError(f"the executor made {tuple(output.shape)} of {tuple(hidden_states.shape)}")
            except Exception as error:  # whatever fails in a kernel becomes a status
                logger.exception("layer %d: a batch of %d rows failed", layer, rows)
                server.fail(f"{type(error).__name__}: {error}")
                continue
            server.reply(output.data_ptr(), WIRE_DTYPES[output.dtype])


class _Window:
    """The server's buffers as tensors and arrays, made anew only where a batch has another size than those before."""

    def __init__(self, server: expertmesh_native.Server, hidden_size: int) -> None:
        self._server = server
        self._hidden_size = hidden_size
        self._version = -1
        self._hidden_states: dict[tuple[int, int], torch.Tensor] = {}

    def show(self, rows: int, pairs: int, dtype: int, version: int) -> tuple[torch.Tensor, Pairs]:
        """[rows, H] of the type and its pairs, as the last batch left them; overwritten by the next."""
        if version != self._version or len(self._hidden_states) > MAX_WINDOWS:
            self._version = version
            self._buffer, self._rows, self._experts, self._weights = self._server.buffers()
            self._hidden_states.clear()
        key = rows, dtype
        hidden_states = self._hidden_states.get(key)
        if hidden_states is None:
            elements = torch.from_numpy(self._buffer).view(DTYPES[dtype])
            hidden_states = elements[: rows * self._hidden_size].view(rows, self._hidden_size)
            self._hidden_states[key] = hidden_states
        return hidden_states, Pairs(self._rows[:pairs], self._experts[:pairs], self._weights[:pairs])


def _pem(tls: CurrentTls) -> tuple[bytes, bytes, bytes]:
    """CA, certificate and key for the next handshake."""
    pem = tls.read()
    return pem.ca, pem.certificate, pem.key


def _reflect(message: bytes) -> bytes | None:
    """One message of server reflection answered by another; None where it is malformed."""
    try:
        request = reflection_pb2.ServerReflectionRequest.FromString(message)
    except DecodeError:
        return None
    servicer = reflection.ReflectionServicer(REFLECTED)
    answer: bytes = next(servicer.ServerReflectionInfo(iter([request]), None)).SerializeToString()
    return answer
