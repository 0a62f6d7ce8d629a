"""The native transport: one call into C++ scatters a layer's rows, one gathers their sums."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import expertmesh_native
import numpy as np
import torch
from numpy.typing import NDArray

from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.channel import CHANNEL_OPTIONS
from expertmesh.wire.tensors import WIRE_DTYPES
from expertmesh.wire.tls import CurrentTls, TlsFiles
from router_service.dispatch.scatter import Pairs, ReplicaBatch
from router_service.replicas import LiveReplica, LiveReplicas
from router_service.transport.base import Answer, Timing
from router_service.transport.links import Links
from router_service.transport.pulse import NO_LAYER, Answered

OPEN_TIMEOUT_S = 5.0
NO_STREAM = -1
MAX_PATIENCE_S = 3600.0


@dataclass(frozen=True, slots=True)
class LayerTimings:
    """Sums over all steps of one layer since the transport began; times in microseconds."""

    steps: int
    messages: int
    rows: int
    scatter_us: int
    """Choosing replicas, copying rows into messages, writing them."""
    wait_us: int
    combine_us: int
    round_trip_us: int
    """Over messages, as are the two below, which replicas report."""
    queue_us: int
    compute_us: int


@dataclass(frozen=True, slots=True)
class NativeStep:
    """A layer's rows on their way."""

    layer: int
    hidden_states: torch.Tensor
    _step: expertmesh_native.Step

    def gather(self) -> torch.Tensor | None:
        """Waits for all answers; the result of `combine`, or None where an answer or a replica is missing."""
        like = self.hidden_states
        if like.is_cuda:
            pinned = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
            # the caching host allocator keeps the memory until the copy is over
            return pinned.to(like.device, non_blocking=True) if self._step.gather(pinned.data_ptr()) else None
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        return out if self._step.gather(out.data_ptr()) else None

    def parts(self) -> tuple[list[ReplicaBatch], NativePending, Pairs | None]:
        """What was sent, what comes back for it, and the pairs that no replica serves; after `gather` gave None."""
        batches = [
            ReplicaBatch(
                replica,
                _array(rows, np.int64),
                _array(pair_rows, np.int32),
                _array(pair_experts, np.int32),
                _array(pair_weights, np.float32),
            )
            for replica, rows, pair_rows, pair_experts, pair_weights, *_ in self._step.parts()
        ]
        tokens, experts, weights = self._step.unserved()
        unserved = Pairs(_array(tokens, np.int64), _array(experts, np.int32), _array(weights, np.float32))
        return batches, NativePending(self._step, self.hidden_states), unserved if tokens else None


@dataclass(frozen=True, slots=True)
class NativePending:
    """Batches under way."""

    step: expertmesh_native.Step
    hidden_states: torch.Tensor

    def late_after_s(self) -> float:
        return self.step.late_after_us() * 1e-6

    def wait(self, patience_s: float) -> list[Answer | None]:
        self.step.wait(int(min(patience_s, MAX_PATIENCE_S) * 1e6))
        return _answers(self.step, self.hidden_states)


@dataclass(frozen=True, slots=True)
class NativeStream:
    """One stream, as the links see it."""

    transport: NativeTransport
    number: int
    end: asyncio.Future[str]

    def ask(self) -> Answered:
        return self.transport._ask(self.number)

    async def ended(self) -> str:
        return await self.end

    async def close(self) -> None:
        self.transport._close_stream(self.number)


class NativeTransport:
    """May be used from any thread; the thread that waits for a step does its input and output itself."""

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
        self._tls = CurrentTls(tls) if tls else None
        server_name = (tls.server_name or "") if tls else ""
        self._client = expertmesh_native.Client(CHANNEL_OPTIONS, fingerprint, timeout_s, server_name, checksums)
        # no thread may be inside the extension when the interpreter goes
        self._finalizer = weakref.finalize(self, self._client.close)
        self._numbers: dict[str, int] = {}
        self._opened: dict[int, asyncio.Future[None]] = {}
        self._ended: dict[int, asyncio.Future[str]] = {}
        replicas.listen(self._use)
        self._links = Links(directory, fingerprint, replicas, self._open, self._tls, directory_tls)
        self._links.loop.call_soon_threadsafe(self._links.loop.add_reader, self._client.event_fd(), self._note_events)

    def scatter(
        self, layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> NativeStep:
        """Sends each token's row of hidden_states [T, H] to the replicas of its experts topk_ids [T, K]; copies it
        once per replica. Weights [T, K] are the gate's; an id below 0 means no expert."""
        rows, ids, weights = _on_host(hidden_states, topk_ids, topk_weights)
        tokens, width = rows.shape
        if ids.shape != weights.shape or len(ids) != tokens:
            raise ValueError(f"{tokens} rows, but ids {tuple(ids.shape)} and weights {tuple(weights.shape)}")
        step = self._client.scatter(
            layer,
            rows.data_ptr(),
            tokens,
            width,
            WIRE_DTYPES[rows.dtype],
            ids.data_ptr(),
            ids.element_size(),
            weights.data_ptr(),
            ids.shape[1],
        )
        return NativeStep(layer, hidden_states, step)

    def start(self, layer: int, hidden_states: torch.Tensor, batches: Sequence[ReplicaBatch]) -> NativePending:
        """Sends each batch's rows of hidden_states [T, H]; copies them once into the message."""
        rows = hidden_states.detach().cpu().contiguous()
        parts = [
            (
                self._numbers.get(batch.replica, NO_STREAM),
                batch.replica,
                batch.rows.astype(np.int64).tobytes(),
                batch.pair_rows.astype(np.int32).tobytes(),
                batch.pair_experts.astype(np.int32).tobytes(),
                batch.pair_weights.astype(np.float32).tobytes(),
            )
            for batch in batches
        ]
        tokens, width = rows.shape
        step = self._client.send(layer, rows.data_ptr(), tokens, width, WIRE_DTYPES[rows.dtype], parts)
        return NativePending(step, hidden_states)

    def timings(self) -> dict[int, LayerTimings]:
        """Layer -> where its time went."""
        timings = self._client.timings()
        return {layer: LayerTimings(*sums) for layer, sums in timings.items() if layer != NO_LAYER}

    def close(self) -> None:
        """Ends the streams and the threads; what is under way fails. More calls do nothing."""
        if self._finalizer.alive:
            self._links.close()
            self._finalizer()

    async def _open(self, address: str, live: LiveReplica) -> NativeStream:
        loop = asyncio.get_running_loop()
        experts = {layer: sorted(held) for layer, held in live.experts.items()}
        pem = self._tls.read() if self._tls else None
        shown = (pem.ca, pem.certificate, pem.key) if pem else None
        number = self._client.open(address, live.replica_id, live.max_rows, experts, shown)
        live.count = lambda: self._client.load(number)
        opened = self._opened[number] = loop.create_future()
        stream = NativeStream(self, number, loop.create_future())
        self._ended[number] = stream.end
        self._numbers[live.replica_id] = number
        try:
            await asyncio.wait([opened, stream.end], timeout=OPEN_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._close_stream(number)
            raise
        return stream

    def _ask(self, number: int) -> Answered:
        nothing = (number, "", b"", b"", b"", b"")
        step = self._client.send(NO_LAYER, 0, 0, 0, pb.DTYPE_FLOAT32, [nothing])

        def answered() -> bool | None:
            if not step.wait(0):
                return False
            code = step.parts()[0][5]
            return None if code in (pb.CODE_DEADLINE_EXCEEDED, pb.CODE_UNAVAILABLE) else True

        return answered

    def _close_stream(self, number: int) -> None:
        self._client.close_stream(number)
        self._opened.pop(number, None)
        self._ended.pop(number, None)
        self._numbers = {replica: one for replica, one in self._numbers.items() if one != number}

    def _note_events(self) -> None:
        for number, reason in self._client.events():
            if reason is None and number in self._opened:
                self._opened.pop(number).set_result(None)
            elif reason is not None and number in self._ended:
                self._ended.pop(number).set_result(reason.decode(errors="replace"))

    def _use(self, live: Mapping[str, LiveReplica]) -> None:
        self._client.use([number for replica, number in self._numbers.items() if replica in live])


def _on_host(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense rows, ids of 4 or 8 bytes and fp32 weights in the host's memory."""
    if topk_weights.dtype is not torch.float32:
        topk_weights = topk_weights.to(torch.float32)
    if topk_ids.dtype not in (torch.int32, torch.int64):
        topk_ids = topk_ids.to(torch.int64)
    tensors = hidden_states.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    if not hidden_states.is_cuda:
        return tensors
    rows, ids, weights = (torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in tensors)
    for pinned, one in zip((rows, ids, weights), tensors, strict=True):
        pinned.copy_(one, non_blocking=True)
    torch.cuda.current_stream(hidden_states.device).synchronize()
    return rows, ids, weights


def _array(data: bytes, element: type[Any]) -> NDArray[Any]:
    return np.frombuffer(bytearray(data), element)


def _answers(step: expertmesh_native.Step, hidden_states: torch.Tensor) -> list[Answer | None]:
    answers: list[Answer | None] = []
    for number, (_, rows, *_columns, code, message, round_trip_us, queue_us, compute_us, there) in enumerate(
        step.parts()
    ):
        if not there:
            answers.append(None)
            continue
        if code != pb.CODE_OK:
            answers.append(Answer(pb.Code.ValueType(code), message.decode(errors="replace")))
            continue
        output = torch.empty(len(rows) // 8, hidden_states.shape[1], dtype=hidden_states.dtype)
        step.copy_output(number, output.data_ptr())
        answers.append(Answer(pb.CODE_OK, output=output, timing=Timing(round_trip_us, queue_us, compute_us)))
    return answers
