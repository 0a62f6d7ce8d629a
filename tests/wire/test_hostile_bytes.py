"""Bytes that are no request, or none that a router would send: both servers say the same, and live on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import numpy
import pytest
import torch
from google.protobuf.message import DecodeError
from marks import needs_native
from mesh import group_args
from tiny_models import EXPERTS, make_checkpoint

from expert_service.replica import Replica
from expertmesh.artifact.manifest import read_manifest
from expertmesh.artifact.prepare import prepare
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.channel import CHANNEL_OPTIONS, FINGERPRINT_KEY
from expertmesh.wire.tensors import encode

pytestmark = needs_native
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


UNKNOWN = tag(99, 0) + varint(7) + tag(98, 1) + bytes(8) + tag(97, 5) + bytes(4) + tag(96, 2) + b"\x03abc"
CASES = {
    "whole": WHOLE,
    "nothing": b"",
    "unknown fields before": UNKNOWN + WHOLE,
    "unknown fields behind": WHOLE + UNKNOWN,
    "unknown groups": WHOLE + nested_groups(20),
    "group of another end": WHOLE + tag(90, 3) + tag(91, 4),
    "group without an end": WHOLE + tag(90, 3) + UNKNOWN,
    "end without a group": WHOLE + tag(90, 4),
    "groups too deep": WHOLE + nested_groups(5000),
    "known field of another type": WHOLE + tag(1, 5) + bytes(4) + tag(3, 0) + varint(1) + tag(7, 2) + b"\x01\x01",
    "field zero": WHOLE + tag(0, 0) + varint(1),
    "wire type six": WHOLE + tag(9, 6),
    "wire type seven": WHOLE + tag(9, 7),
    "tag of five bytes": WHOLE + b"\xf8\xff\xff\xff\x0f\x01",
    "tag beyond 32 bits": WHOLE + b"\xf8\xff\xff\xff\x7f\x01",
    "tag of ten bytes": WHOLE + b"\x88\x80\x80\x80\x80\x80\x80\x80\x80\x00\x01",
    "varint of eleven bytes": WHOLE + tag(1, 0) + b"\xff" * 10 + b"\x01",
    "varint of 64 bits": WHOLE + tag(1, 0) + b"\xff" * 9 + b"\x01",
    "varint beyond 64 bits": WHOLE + tag(1, 0) + b"\xff" * 9 + b"\x7f",
    "varint without an end": WHOLE + tag(1, 0) + b"\xff",
    "long zero": WHOLE + tag(1, 0) + b"\x80" * 9 + b"\x00",
    "length beyond the end": WHOLE + tag(96, 2) + varint(5) + b"abc",
    "length of 2^31": WHOLE + tag(96, 2) + varint(2**31) + b"abc",
    "length of 2^64": WHOLE + tag(96, 2) + varint(2**64 - 1) + b"abc",
    "tensor beyond the request": tag(3, 2) + varint(2**32 - 1) + bytes(16),
    "data beyond the tensor": tag(3, 2) + varint(4) + tag(4, 2) + varint(200) + bytes(300),
    "fields come twice": WHOLE + pb.DispatchRequest(id=3, pair_weights=floats(1, 2, 3)).SerializeToString(),
    "tensor in two parts": WHOLE + pb.DispatchRequest(hidden_states=pb.Tensor(rows=4, width=32)).SerializeToString(),
    "layer of 33 bits": WHOLE + tag(2, 0) + varint(2**32),
    "rows of 40 bits": WHOLE + tag(3, 2) + b"\x07" + tag(2, 0) + varint(2**39 + 2)[:6] + b"",
    "negative dtype": WHOLE + tag(7, 0) + b"\xff" * 9 + b"\x01",
    "dtype of 33 bits": WHOLE + tag(7, 0) + varint(2**32 + 2),
    "timeout of 2^64": WHOLE + tag(8, 0) + b"\xff" * 9 + b"\x01",
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "text": b"GET / HTTP/1.1\r\nHost: replica\r\n\r\n",
}  # fmt: skip


def mutated(chance: random.Random) -> bytes:
    """The request with some bytes changed, cut out or put in; mostly outside the rows, where it matters."""
    message = bytearray(WHOLE)
    for _ in range(chance.randint(1, 4)):
        tail = len(WHOLE) - 80
        position = chance.choice([chance.randrange(24), chance.randrange(tail, len(WHOLE))])
        position = min(position, len(message) - 1)
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


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Replica]]:
    folder = tmp_path_factory.mktemp("hostile")
    artifact = folder / "artifact"
    prepare(make_checkpoint("mixtral", folder / "checkpoint"), artifact)
    with ExitStack() as stack:
        replicas = {}
        for transport in ("python", "native"):
            args = group_args(artifact, "", "g", set(range(EXPERTS // 2)), transport=transport)
            replicas[transport] = Replica(args, None)
            stack.callback(replicas[transport].stop)
        fingerprint = read_manifest(artifact).fingerprint
        assert fingerprint == replicas["python"].entry().fingerprint
        yield replicas


def said(replica: Replica, messages: list[bytes]) -> list[Any]:
    """What a replica answers to each, sent on a stream of its own: an answer's code, text and output, or the
    stream's status."""

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
        return answer.id, answer.status.code, answer.status.message, answer.output.SerializeToString()

    async def ask_all() -> list[Any]:
        async with grpc.aio.insecure_channel(replica.address, CHANNEL_OPTIONS) as channel:
            return [await ask(channel, message) for message in messages]

    return asyncio.run(ask_all())


def compare(servers: dict[str, Replica], messages: list[bytes]) -> set[Any]:
    """Both say the same to each; returns the codes that were seen."""
    expected = said(servers["python"], messages)
    got = said(servers["native"], messages)
    for message, one, other in zip(messages, expected, got, strict=True):
        assert one == other, message.hex()
    assert all(replica.problem() is None for replica in servers.values())
    return {each[0] if len(each) == 2 else each[1] for each in expected}


@pytest.mark.parametrize("case", CASES)
def test_both_servers_say_the_same(servers: dict[str, Replica], case: str) -> None:
    compare(servers, [CASES[case]])


def test_both_servers_say_the_same_to_every_beginning_of_a_request(servers: dict[str, Replica]) -> None:
    lengths = [*range(40), *range(len(WHOLE) - 90, len(WHOLE) + 1)]
    codes = compare(servers, [WHOLE[:length] for length in lengths])
    assert {grpc.StatusCode.INVALID_ARGUMENT, pb.CODE_INVALID_ARGUMENT, pb.CODE_OK} <= codes


def test_both_servers_say_the_same_to_mutated_requests(servers: dict[str, Replica]) -> None:
    chance = random.Random(11)
    messages = [mutated(chance) for _ in range(400)]
    codes = compare(servers, [message for message in messages if not is_hasty(message)])
    assert {grpc.StatusCode.INVALID_ARGUMENT, pb.CODE_INVALID_ARGUMENT, pb.CODE_NOT_FOUND, pb.CODE_OK} <= codes


def test_both_servers_say_the_same_to_random_bytes(servers: dict[str, Replica]) -> None:
    chance = random.Random(12)
    assert grpc.StatusCode.INVALID_ARGUMENT in compare(servers, [chance.randbytes(2 ** (n % 9)) for n in range(150)])


def test_both_servers_answer_other_calls_alike(servers: dict[str, Replica]) -> None:
    """Methods that do not exist, messages that are none, and calls without a message."""

    def ask(address: str, method: str, message: bytes) -> grpc.StatusCode:
        with grpc.insecure_channel(address) as channel:
            try:
                channel.unary_unary(method)(message, timeout=30)
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

    asked = [
        ("/expertmesh.v1.ExpertService/Describe", b""),
        ("/expertmesh.v1.ExpertService/Nothing", b""),
        ("/nobody.Service/Call", b"x"),
        ("/grpc.health.v1.Health/Check", b""),
        ("/grpc.health.v1.Health/Check", b"\x0a\x07unknown"),
    ]
    for method, message in asked:
        codes = {name: ask(replica.address, method, message) for name, replica in servers.items()}
        assert codes["native"] == codes["python"], (method, message, codes)


def test_numbers_survive_a_message_cut_into_many_frames(servers: dict[str, Replica]) -> None:
    """Rows that begin at any offset of a slice: 1,500 rows are some 12 frames of HTTP/2."""
    rows = torch.randn(1500, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    pairs = {
        "pair_rows": encode(torch.arange(1500, dtype=torch.int32)),
        "pair_experts": encode(torch.from_numpy((numpy.arange(1500) % 4).astype(numpy.int32))),
        "pair_weights": encode(torch.rand(1500, generator=torch.Generator().manual_seed(2))),
    }
    messages = [
        pb.DispatchRequest(
            id=1, layer=0, hidden_states=encode(rows), output_dtype=dtype, timeout_us=timeout, **pairs
        ).SerializeToString()
        for dtype, timeout in [(pb.DTYPE_BFLOAT16, 0), (pb.DTYPE_FLOAT16, 10**9), (pb.DTYPE_FLOAT32, 10**15)]
    ]
    assert compare(servers, messages) == {pb.CODE_OK}
