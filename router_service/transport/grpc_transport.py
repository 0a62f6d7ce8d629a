"""The pure Python transport: exchanges batches over the streams that its links hold open.

The thread that waits for a step runs the streams' event loop itself meanwhile; threads that wait at the same time are
served by it or by the loop's own thread.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Sequence

import numpy as np
import torch

from expertmesh.errors import WireError
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.tensors import WIRE_DTYPES, decode
from expertmesh.wire.tls import CurrentTls, TlsFiles
from router_service.dispatch.scatter import ReplicaBatch
from router_service.replicas import LiveReplica, LiveReplicas
from router_service.transport.base import Answer, Timing
from router_service.transport.links import Links
from router_service.transport.shared_loop import SharedLoop
from router_service.transport.stream import ReplicaStream, Reply

LOOK_AGAIN_S = 0.005
"""How often a thread that waits while another one runs the loop looks whether it may run it."""


class Step:
    """Requests under way, sent together. All but `wait` runs on the loop."""

    def __init__(self, shared: SharedLoop, requests: Sequence[tuple[ReplicaStream | None, pb.DispatchRequest]]) -> None:
        self._shared = shared
        self._requests = requests
        self._replies: list[Reply | None] = [None] * len(requests)
        self._missing = len(requests)
        self._done = threading.Event()
        if not requests:
            self._done.set()
        self._timer: asyncio.TimerHandle | None = None
        waits = [stream.late_after_s(request.hidden_states.rows) for stream, request in requests if stream]
        self._late_at = time.monotonic() + max(waits, default=0.0)

    def send(self, timeout_s: float) -> None:
        ids = [
            stream.send(request, functools.partial(self._note, number)) if stream else 0
            for number, (stream, request) in enumerate(self._requests)
        ]
        for number, (stream, _) in enumerate(self._requests):
            if stream is None:
                self._note(number, Reply(None, pb.CODE_UNAVAILABLE, "no stream to it"))
        if self._missing:
            self._timer = self._shared.loop.call_later(timeout_s, self._give_up, ids, timeout_s)

    def late_after_s(self) -> float:
        return max(0.0, self._late_at - time.monotonic())

    def wait(self, patience_s: float) -> list[Answer | None]:
        until = time.monotonic() + patience_s
        while not self._done.is_set():
            with self._shared.borrow() as ours:
                if ours:
                    self._shared.run_until(self._done.is_set, until)
            if time.monotonic() >= until:
                break
            if not ours:
                self._shared.call_soon(lambda: None)
                self._done.wait(LOOK_AGAIN_S)
        return [
            None if reply is None else _to_answer(request, reply)
            for (_, request), reply in zip(self._requests, self._replies, strict=True)
        ]

    def _note(self, number: int, reply: Reply) -> None:
        self._replies[number] = reply
        self._missing -= 1
        if not self._missing:
            if self._timer is not None:
                self._timer.cancel()
            self._done.set()
            self._shared.interrupt()

    def _give_up(self, ids: Sequence[int], timeout_s: float) -> None:
        late = Reply(None, pb.CODE_DEADLINE_EXCEEDED, f"no answer within {timeout_s:g} s")
        for (stream, _), request_id in zip(self._requests, ids, strict=True):
            if stream is not None:
                stream.give_up(request_id, late)


class GrpcTransport:
    """May be used from any thread and process."""

    def __init__(
        self,
        directory: str,
        fingerprint: str,
        replicas: LiveReplicas,
        timeout_s: float = 30.0,
        tls: TlsFiles | None = None,
        directory_tls: TlsFiles | None = None,
        checksums: bool = False,
    ) -> None:
        self._fingerprint = fingerprint
        self._checksums = checksums
        self._timeout_s = timeout_s
        self._tls = CurrentTls(tls) if tls else None
        self._streams: dict[str, ReplicaStream] = {}
        self._replicas = replicas
        self._links = Links(directory, fingerprint, replicas, self._open, self._tls, directory_tls)
        self._shared = self._links.shared

    def start(self, layer: int, hidden_states: torch.Tensor, batches: Sequence[ReplicaBatch]) -> Step:
        """Sends each batch's rows of hidden_states [T, H]; copies them once to the host and twice on the way out."""
        host = hidden_states.detach().cpu().contiguous()
        rows_TB = host.view(torch.uint8).numpy()
        timeout_us = int(self._timeout_s * 1e6)
        requests = [
            (self._streams.get(batch.replica), _request(layer, rows_TB, host.dtype, batch, timeout_us))
            for batch in batches
        ]
        step = Step(self._shared, requests)
        with self._shared.borrow() as ours:
            if ours:
                self._shared.loop.call_soon(step.send, self._timeout_s)
                self._shared.run_once()
                return step
        self._shared.call_soon(functools.partial(step.send, self._timeout_s))
        return step

    def close(self) -> None:
        """Ends the streams and the thread."""
        self._links.close()

    async def _open(self, address: str, live: LiveReplica) -> ReplicaStream:
        known = self._replicas.snapshot()
        alike = [key for key, one in known.items() if one.experts == live.experts and key in self._streams]
        peer = next((self._streams[key].latency for key in alike if self._streams[key].latency.known), None)
        stream = ReplicaStream(address, self._fingerprint, live, self._tls, self._checksums, peer)
        self._streams = {key: one for key, one in self._streams.items() if key in known}
        self._streams[live.replica_id] = stream
        return stream


def _request(
    layer: int, rows_TB: np.ndarray, dtype: torch.dtype, batch: ReplicaBatch, timeout_us: int
) -> pb.DispatchRequest:
    """rows_TB: the bytes of each token's row."""
    rows_RB = rows_TB if len(batch.rows) == len(rows_TB) else rows_TB[batch.rows]
    wire_dtype = WIRE_DTYPES[dtype]
    width = rows_RB.shape[1] // dtype.itemsize
    pairs = len(batch.pair_rows)
    return pb.DispatchRequest(
        layer=layer,
        hidden_states=pb.Tensor(dtype=wire_dtype, rows=len(rows_RB), width=width, data=rows_RB.tobytes()),
        pair_rows=pb.Tensor(dtype=pb.DTYPE_INT32, rows=pairs, width=1, data=batch.pair_rows.tobytes()),
        pair_experts=pb.Tensor(dtype=pb.DTYPE_INT32, rows=pairs, width=1, data=batch.pair_experts.tobytes()),
        pair_weights=pb.Tensor(dtype=pb.DTYPE_FLOAT32, rows=pairs, width=1, data=batch.pair_weights.tobytes()),
        output_dtype=wire_dtype,
        timeout_us=timeout_us,
    )


def _to_answer(request: pb.DispatchRequest, reply: Reply) -> Answer:
    """Checks the response against what was asked: another shape or type counts as a failure of the replica."""
    response = reply.response
    if response is None or reply.code != pb.CODE_OK:
        return Answer(reply.code, reply.message)
    if response.status.code != pb.CODE_OK:
        return Answer(response.status.code, response.status.message)
    sent = request.hidden_states
    try:
        output = decode(response.output, "output")
    except WireError as error:
        return Answer(pb.CODE_INTERNAL, str(error))
    if output.shape != (sent.rows, sent.width) or response.output.dtype != request.output_dtype:
        return Answer(
            pb.CODE_INTERNAL, f"answered {tuple(output.shape)} {output.dtype} for {sent.rows} x {sent.width} rows"
        )
    timing = Timing(reply.round_trip_us, response.timings.queue_us, response.timings.compute_us)
    return Answer(pb.CODE_OK, output=output, timing=timing)
