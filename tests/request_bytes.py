"""Requests as bytes, damaged ones, and what a replica says to them."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import torch
from google.protobuf.message import DecodeError

from expert_service.replica import Replica
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.channel import CHANNEL_OPTIONS, FINGERPRINT_KEY
from expertmesh.wire.checksum import answer_checksum, request_checksum
from expertmesh.wire.tensors import encode

METHOD = "/expertmesh.v1.ExpertService/Dispatch"
HIDDEN = 64


def ints(*values: int) -> pb.Tensor:
    return encode(torch.tensor(values, dtype=torch.int32))


def floats(*values: float) -> pb.Tensor:
    return encode(torch.tensor(values, dtype=torch.float32))


REQUEST = pb.DispatchRequest(
    id=2**63 + 5,
    layer=0,
    hidden_states=encode(torch.linspace(-1, 1, 2 * HIDDEN).view(2, HIDDEN).bfloat16()),
    pair_rows=ints(0, 1, 1),
    pair_experts=ints(0, 1, 3),
    pair_weights=floats(0.25, 0.5, 1.0),
    output_dtype=pb.DTYPE_FLOAT32,
    timeout_us=60_000_000,
)
WHOLE = REQUEST.SerializeToString()


def checked(request: pb.DispatchRequest) -> pb.DispatchRequest:
    """The same request with the checksum that belongs to it."""
    made = pb.DispatchRequest()
    made.CopyFrom(request)
    made.checksum = request_checksum(request)
    return made


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def tag(field: int, wire_type: int) -> bytes:
    return varint(field << 3 | wire_type)


def nested_groups(depth: int) -> bytes:
    return b"".join(tag(90, 3) for _ in range(depth)) + b"".join(tag(90, 4) for _ in range(depth))


def mutated(chance: random.Random, whole: bytes = WHOLE) -> bytes:
    """The request with some bytes changed, cut out or put in; mostly outside the rows, where it matters."""
    message = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        tail = max(0, len(whole) - 80)
        position = chance.choice([chance.randrange(24), chance.randrange(tail, len(whole))])
        position = max(0, min(position, len(message) - 1))
        if not message:
            break
        what = chance.randrange(4)
        if what == 0:
            message[position] = chance.randrange(256)
        elif what == 1:
            message[position] ^= 1 << chance.randrange(8)
        elif what == 2:
            del message[position : position + chance.randint(1, 8)]
        else:
            message[position:position] = chance.randbytes(chance.randint(1, 12))
    return bytes(message)


def is_hasty(message: bytes) -> bool:
    """Whether it may expire in the queue, so that chance decides what is said."""
    try:
        return 0 < pb.DispatchRequest.FromString(message).timeout_us < 10_000_000
    except DecodeError:
        return False


def said(replica: Replica, messages: list[bytes]) -> list[Any]:
    """What a replica answers to each, sent on a stream of its own: an answer's id, code, text, output and whether its
    checksum is right (None: it has none), or the stream's status."""
    return asyncio.run(asked(replica, messages))


async def asked(replica: Replica, messages: list[bytes]) -> list[Any]:
    """As `said`; raises TimeoutError where one has no answer within a minute."""

    async def ask(channel: grpc.aio.Channel, message: bytes) -> Any:
        call: Any = channel.stream_stream(METHOD)(metadata=((FINGERPRINT_KEY, replica.entry().fingerprint),))
        await call.write(message)
        await call.done_writing()
        async with asyncio.timeout(60):
            try:
                read = await call.read()
            except grpc.aio.AioRpcError:
                read = grpc.aio.EOF
            if read is grpc.aio.EOF:
                return await call.code(), await call.details()
        answer = pb.DispatchResponse.FromString(read)
        right = answer.checksum == answer_checksum(answer) if answer.HasField("checksum") else None
        return answer.id, answer.status.code, answer.status.message, answer.output.SerializeToString(), right

    async with grpc.aio.insecure_channel(replica.address, CHANNEL_OPTIONS) as channel:
        return [await ask(channel, message) for message in messages]
