"""A replica whose answers a test writes: a plain grpcio server that exchanges bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import torch

from expertmesh.directory.client import METADATA
from expertmesh.v1 import directory_pb2, directory_pb2_grpc
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.channel import PROTOCOL_VERSION
from expertmesh.wire.checksum import answer_checksum
from expertmesh.wire.tensors import DTYPES, decode, encode
from router_service.transport.pulse import NO_LAYER

FINGERPRINT = "f" * 64
LAYER = 0
Script = Callable[[pb.DispatchRequest], Iterator[bytes]]
"""What goes back for one request, message by message; an exception ends the stream."""


class StreamBreaks(Exception):
    """Raised by a script to end its stream."""


def weighted(request: pb.DispatchRequest) -> torch.Tensor:
    """What the experts give if expert e multiplies by e + 1: depends on nothing but a row and its pairs."""
    rows = decode(request.hidden_states).to(torch.float32)
    experts, weights = decode(request.pair_experts).flatten(), decode(request.pair_weights).flatten()
    factors = torch.zeros(len(rows))
    factors.index_add_(0, decode(request.pair_rows).flatten().long(), weights * (experts + 1))
    return (rows * factors[:, None]).to(DTYPES[request.output_dtype])


def success(request: pb.DispatchRequest) -> pb.DispatchResponse:
    timings = pb.Timings(queue_us=7, compute_us=11, batch_rows=request.hidden_states.rows)
    response = pb.DispatchResponse(
        id=request.id, status=pb.Status(code=pb.CODE_OK), output=encode(weighted(request)), timings=timings
    )
    return checked(response) if request.HasField("checksum") else response


def checked(response: pb.DispatchResponse) -> pb.DispatchResponse:
    """With the checksum that belongs to it."""
    response.checksum = answer_checksum(response)
    return response


def obliging(request: pb.DispatchRequest) -> Iterator[bytes]:
    yield success(request).SerializeToString()


class ScriptedReplica:
    """Serves and is announced while `running` runs."""

    def __init__(self, name: str, experts: set[int], script: Script = obliging, max_rows: int = 1000) -> None:
        self.name = name
        self.script = script
        self.requests: list[pb.DispatchRequest] = []
        self._layers = [pb.LayerExperts(layer=LAYER, experts=sorted(experts))]
        self._max_rows = max_rows
        self._lock = threading.Lock()

    def describe(self, request: bytes, context: Any) -> bytes:
        return pb.DescribeResponse(
            replica_id=self.name,
            group="g",
            fingerprint=FINGERPRINT,
            layers=self._layers,
            limits=pb.Limits(max_rows=self._max_rows, max_queued_rows=1000),
            state=pb.REPLICA_STATE_READY,
            protocol_version=PROTOCOL_VERSION,
        ).SerializeToString()

    def dispatch(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        try:
            for message in requests:
                request = pb.DispatchRequest.FromString(message)
                if request.layer == NO_LAYER:
                    yield pb.DispatchResponse(
                        id=request.id, status=pb.Status(code=pb.CODE_NOT_FOUND)
                    ).SerializeToString()
                    continue
                with self._lock:
                    self.requests.append(request)
                yield from self.script(request)
        except StreamBreaks:
            context.abort(grpc.StatusCode.INTERNAL, "broken on purpose")

    @contextmanager
    def running(self, directory: str) -> Iterator[None]:
        handlers: dict[str, Any] = {
            "Describe": grpc.unary_unary_rpc_method_handler(self.describe),
            "Dispatch": grpc.stream_stream_rpc_method_handler(self.dispatch),
        }
        server = grpc.server(futures.ThreadPoolExecutor(8))
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("expertmesh.v1.ExpertService", handlers),)
        )
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        entry = directory_pb2.Replica(
            replica_id=self.name,
            group="g",
            address=address,
            fingerprint=FINGERPRINT,
            layers=self._layers,
            state=pb.REPLICA_STATE_READY,
        )
        with grpc.insecure_channel(directory) as channel:
            stub = directory_pb2_grpc.DirectoryServiceStub(channel)
            stub.Announce(directory_pb2.AnnounceRequest(replica=entry, lease_ms=600_000), metadata=METADATA)
            try:
                yield
            finally:
                stub.Withdraw(directory_pb2.WithdrawRequest(replica_id=self.name), metadata=METADATA)
                server.stop(0)
