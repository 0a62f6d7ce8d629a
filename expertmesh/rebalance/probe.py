"""Whether a new replica answers as those do that serve already: asked over the wire, as a router asks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy
from numpy.typing import NDArray

from expertmesh.errors import ClusterError
from expertmesh.experts import LayerExperts, format_indices
from expertmesh.v1 import directory_pb2
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.v1 import expert_pb2_grpc as pb_grpc
from expertmesh.wire.channel import FINGERPRINT_KEY, PROTOCOL_VERSION, open_channel
from expertmesh.wire.status import code_name
from expertmesh.wire.tls import CurrentTls, TlsFiles

TOLERANCE = {pb.DTYPE_FLOAT32: 1e-3, pb.DTYPE_BFLOAT16: 0.05, pb.DTYPE_FLOAT16: 0.01}
"""Largest difference of one element, as a share of the root mean square of the row that it is compared with, by the
model's type: executors round at other places, a wrong expert is off by about 1."""
ROWS = 16
"""In one message, so that requests beside it hardly wait."""
TIMEOUT_S = 10.0
ATTEMPTS, PAUSE_S = 50, 0.1
"""Where a queue is full."""

Row = NDArray[numpy.float32]


class Unverified(ClusterError):
    """A replica that does not answer as it should."""


class Unwitnessed(ClusterError):
    """Nothing is known of the new replica: of those that should answer the same, each failed."""


@dataclass(frozen=True)
class Verified:
    compared: int
    """(layer, expert) pairs whose rows another replica answered too."""
    alone: int
    """Those that no other replica holds: only their shape and that they are numbers was checked."""
    worst: float
    """Largest difference, as a share of the row's root mean square."""
    failed: tuple[str, ...] = ()
    """Of each of the others that was asked and did not answer: its address and why."""


def verify(
    new: directory_pb2.Replica,
    others: Sequence[directory_pb2.Replica],
    wanted: LayerExperts,
    fingerprint: str,
    tls: TlsFiles | None = None,
) -> Verified:
    """Asks `new` for one random row of every expert that it should hold, and one of `others` for the same: the least
    busy that holds it, the next one where that fails.

    Raises Unverified where `new` fails, serves another model or other experts, or where an answer differs by more than
    TOLERANCE; Unwitnessed where some of `others` hold an expert and none of them answers.
    """
    return asyncio.run(_verify(new, others, wanted, fingerprint, tls))


def rows_total(addresses: Sequence[str], tls: TlsFiles | None = None) -> dict[str, int]:
    """Rows that each replica has computed, as it says itself; those that do not answer are left out."""

    async def ask(address: str) -> int | None:
        async with Peer(address, "", tls) as peer:
            try:
                return (await peer.describe()).load.rows_total
            except Unverified:
                return None

    async def ask_all() -> dict[str, int]:
        found = await asyncio.gather(*map(ask, addresses))
        return {address: rows for address, rows in zip(addresses, found, strict=True) if rows is not None}

    return asyncio.run(ask_all())


@dataclass
class Peer:
    """One replica's channel and, once rows are sent, its stream."""

    address: str
    fingerprint: str
    tls: TlsFiles | None = None
    _calls: dict[str, Any] = field(default_factory=dict)
    _sent: int = 0

    async def __aenter__(self) -> Peer:
        self._channel = open_channel(self.address, CurrentTls(self.tls) if self.tls else None)
        self._stub = pb_grpc.ExpertServiceStub(self._channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        if call := self._calls.get("dispatch"):
            await call.done_writing()
        await self._channel.close()

    async def describe(self) -> pb.DescribeResponse:
        request: Any = self._stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT_S)
        answer: pb.DescribeResponse = await self._within(request)
        return answer

    async def answer(self, layer: int, experts: Sequence[int], rows: Row) -> Row:
        """Row i of `rows` [R, H] through experts[i] of the layer, weight 1: [R, H]."""
        if "dispatch" not in self._calls:
            self._calls["dispatch"] = self._stub.Dispatch(metadata=((FINGERPRINT_KEY, self.fingerprint),))
        call = self._calls["dispatch"]
        for _ in range(ATTEMPTS):
            self._sent += 1
            await self._within(call.write(_request(self._sent, layer, experts, rows)))
            response = await self._within(call.read())
            if not isinstance(response, pb.DispatchResponse):
                raise Unverified(f"{self.address}: it ended the stream")
            if response.status.code == pb.CODE_OK:
                return self._rows_of(response.output, rows.shape)
            if response.status.code != pb.CODE_RESOURCE_EXHAUSTED:
                break
            await asyncio.sleep(PAUSE_S)
        code = code_name(response.status.code)
        raise Unverified(f"{self.address}: layer {layer}: {code} {response.status.message}".rstrip())

    def _rows_of(self, output: pb.Tensor, shape: tuple[int, ...]) -> Row:
        if (output.rows, output.width) != shape or len(output.data) != 4 * shape[0] * shape[1]:
            raise Unverified(
                f"{self.address}: answered {output.rows} x {output.width} for {shape[0]} x {shape[1]} rows"
            )
        found = numpy.frombuffer(output.data, dtype=numpy.float32).reshape(shape)
        if not numpy.isfinite(found).all():
            raise Unverified(f"{self.address}: answered what is no number")
        return found

    async def _within(self, call: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await call
        except TimeoutError:
            raise Unverified(f"{self.address}: no answer within {TIMEOUT_S:.0f} s") from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
            raise Unverified(f"{self.address}: {(details or 'the call failed').splitlines()[0]}") from None


@dataclass
class Witnesses:
    """Replicas that serve already. One that fails is asked no more."""

    peer: Callable[[str], Awaitable[Peer]]
    owners: Mapping[int, Mapping[int, Sequence[str]]]
    """Layer -> expert -> addresses, in the order in which to ask."""
    failed: dict[str, str] = field(default_factory=dict)
    """Address -> why; the reason names the address."""

    async def answers(self, layer: int, experts: Sequence[int], rows: Row) -> dict[int, tuple[str, Row]]:
        """Expert -> who answered for its row of `rows` [R, H], and what; without those that nobody holds. Raises
        Unwitnessed."""
        found: dict[int, tuple[str, Row]] = {}
        while missing := [one for one in experts if one in self.owners[layer] and one not in found]:
            address = self._next(layer, missing[0])
            asked = [one for one in missing if address in self.owners[layer][one]]
            try:
                answers = await (await self.peer(address)).answer(layer, asked, rows[[experts.index(e) for e in asked]])
            except Unverified as error:
                self.failed[address] = str(error)
            else:
                found |= {one: (address, answer) for one, answer in zip(asked, answers, strict=True)}
        return found

    def _next(self, layer: int, expert: int) -> str:
        owners = self.owners[layer][expert]
        for address in owners:
            if address not in self.failed:
                return address
        raise Unwitnessed(
            f"layer {layer}, expert {expert}: no other replica answers: {'; '.join(self.failed[one] for one in owners)}"
        )


async def _verify(
    new: directory_pb2.Replica,
    others: Sequence[directory_pb2.Replica],
    wanted: LayerExperts,
    fingerprint: str,
    tls: TlsFiles | None,
) -> Verified:
    who = f"replica {new.replica_id} at {new.address}"
    async with contextlib.AsyncExitStack() as stack:

        async def peer(address: str) -> Peer:
            if address not in peers:
                peers[address] = await stack.enter_async_context(Peer(address, fingerprint, tls))
            return peers[address]

        peers: dict[str, Peer] = {}
        described = await (await peer(new.address)).describe()
        check_description(described, who, wanted, fingerprint)
        tolerance = TOLERANCE.get(described.dtype, max(TOLERANCE.values()))
        witnesses = Witnesses(peer, _owners(others, wanted))
        compared, alone, worst = 0, 0, 0.0
        for layer, experts in sorted(wanted.items()):
            ordered = sorted(experts)
            for start in range(0, len(ordered), min(ROWS, described.limits.max_rows or ROWS)):
                part = ordered[start : start + min(ROWS, described.limits.max_rows or ROWS)]
                rows = _random_rows(layer, part, described.hidden_size)
                found = await (await peer(new.address)).answer(layer, part, rows)
                expected = await witnesses.answers(layer, part, rows)
                alone += len(part) - len(expected)
                compared += len(expected)
                for row, expert in zip(found, part, strict=True):
                    if expert not in expected:
                        continue
                    address, answer = expected[expert]
                    off = difference(row, answer)
                    worst = max(worst, off)
                    if off > tolerance:
                        raise Unverified(
                            f"{who}: layer {layer}, expert {expert}: its answer differs from that of "
                            f"{address} by {off:.2g} of the row's RMS, {tolerance:g} is allowed"
                        )
    return Verified(compared, alone, worst, tuple(witnesses.failed.values()))


def check_description(told: pb.DescribeResponse, who: str, wanted: LayerExperts, fingerprint: str) -> None:
    """Raises Unverified where the replica says of itself that it is another than it should be."""
    if told.protocol_version != PROTOCOL_VERSION:
        raise Unverified(f"{who}: speaks protocol {told.protocol_version}, not {PROTOCOL_VERSION}")
    if told.fingerprint != fingerprint:
        raise Unverified(f"{who}: serves model {told.fingerprint[:12]}, not {fingerprint[:12]}")
    held = {layer.layer: frozenset(layer.experts) for layer in told.layers}
    for layer, experts in sorted(wanted.items()):
        missing = experts - held.get(layer, frozenset())
        if missing:
            raise Unverified(f"{who}: layer {layer}: does not hold {format_indices(missing)}")


def difference(row: Row, expected: Row) -> float:
    """Largest difference of an element, as a share of the root mean square of `expected`."""
    scale = float(numpy.sqrt(numpy.mean(numpy.square(expected))))
    off = float(numpy.abs(row - expected).max(initial=0.0))
    return off / scale if scale else off


def _owners(others: Sequence[directory_pb2.Replica], wanted: LayerExperts) -> dict[int, dict[int, list[str]]]:
    """Layer -> expert -> the replicas that hold it, the least busy first."""
    owners: dict[int, dict[int, list[str]]] = {layer: {} for layer in wanted}
    for replica in sorted(others, key=lambda one: one.load.busy):
        for held in replica.layers:
            for expert in wanted.get(held.layer, frozenset()).intersection(held.experts):
                owners[held.layer].setdefault(expert, []).append(replica.address)
    return owners


def _random_rows(layer: int, experts: Sequence[int], hidden_size: int) -> Row:
    """The same for the same expert, whoever is asked."""
    rows = [numpy.random.default_rng((layer, expert)).standard_normal(hidden_size) for expert in experts]
    return numpy.asarray(rows, dtype=numpy.float32)


def _request(number: int, layer: int, experts: Sequence[int], rows: Row) -> pb.DispatchRequest:
    count = len(rows)

    def column(dtype: pb.DType.ValueType, values: NDArray[Any]) -> pb.Tensor:
        return pb.Tensor(dtype=dtype, rows=count, width=1, data=values.tobytes())

    return pb.DispatchRequest(
        id=number,
        layer=layer,
        hidden_states=pb.Tensor(dtype=pb.DTYPE_FLOAT32, rows=count, width=rows.shape[1], data=rows.tobytes()),
        pair_rows=column(pb.DTYPE_INT32, numpy.arange(count, dtype=numpy.int32)),
        pair_experts=column(pb.DTYPE_INT32, numpy.asarray(experts, dtype=numpy.int32)),
        pair_weights=column(pb.DTYPE_FLOAT32, numpy.ones(count, dtype=numpy.float32)),
        output_dtype=pb.DTYPE_FLOAT32,
    )
