"""Bytes that are no request, or none that a router would send: both servers say the same, and live on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import numpy
import pytest
import torch
from marks import needs_native
from mesh import group_args
from request_bytes import HIDDEN, REQUEST, WHOLE, checked, floats, is_hasty, mutated, nested_groups, said, tag, varint
from tiny_models import EXPERTS, make_checkpoint

from expert_service.replica import Replica
from expertmesh.artifact.manifest import read_manifest
from expertmesh.artifact.prepare import prepare
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.tensors import encode

pytestmark = needs_native

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
    "field zero in a group": WHOLE + tag(90, 3) + tag(0, 0) + varint(1) + tag(0, 3) + tag(0, 4) + tag(90, 4),
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
    "checksum": checked(REQUEST).SerializeToString(),
    "another checksum": WHOLE + tag(9, 5) + bytes(4),
    "checksum that comes twice": WHOLE + tag(9, 5) + bytes(4) + checked(REQUEST).SerializeToString()[-5:],
    "checksum of another type": WHOLE + tag(9, 0) + varint(7),
    "checksum of three bytes": WHOLE + tag(9, 5) + bytes(3),
    "checksum of a request that is refused": checked(pb.DispatchRequest(id=3, layer=77)).SerializeToString(),
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "text": b"GET / HTTP/1.1\r\nHost: replica\r\n\r\n",
}  # fmt: skip


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


def test_a_checksum_is_verified_and_answered_with_one(servers: dict[str, Replica]) -> None:
    cases = ("checksum", "another checksum", "checksum of a request that is refused", "whole")
    right, wrong, refused, without = said(servers["native"], [CASES[case] for case in cases])
    assert right[1] == pb.CODE_OK and right[4] is True
    assert wrong[1:3] == (pb.CODE_DATA_LOSS, "the request's checksum differs: bytes changed on the way") and wrong[4]
    assert refused[1] == pb.CODE_NOT_FOUND and refused[4] is True
    assert without[1] == pb.CODE_OK and without[4] is None


def test_no_bit_of_a_request_with_a_checksum_changes_a_sum(servers: dict[str, Replica]) -> None:
    """Each bit flipped alone, of rows, pairs, header and checksum: what comes back is not believed, or is right."""
    message = checked(REQUEST).SerializeToString()
    flipped = [bytes(message[:at]) + bytes([message[at] ^ 1 << bit]) + message[at + 1 :]
               for at in range(len(message)) for bit in range(8)]  # fmt: skip
    (right,) = said(servers["python"], [message])
    codes = set()
    for name, replica in servers.items():
        for answer in said(replica, flipped):
            codes.add(answer[0] if len(answer) == 2 else answer[1])
            believed = len(answer) == 5 and answer[0] == REQUEST.id and answer[4] is True
            assert not believed or answer[1] == pb.CODE_DATA_LOSS or answer == right, (name, answer)
    assert pb.CODE_DATA_LOSS in codes and grpc.StatusCode.INVALID_ARGUMENT in codes


def test_both_servers_say_the_same_to_every_beginning_of_a_request(servers: dict[str, Replica]) -> None:
    lengths = [*range(40), *range(len(WHOLE) - 90, len(WHOLE) + 1)]
    codes = compare(servers, [WHOLE[:length] for length in lengths])
    assert {grpc.StatusCode.INVALID_ARGUMENT, pb.CODE_INVALID_ARGUMENT, pb.CODE_OK} <= codes


def test_both_servers_say_the_same_to_mutated_requests(servers: dict[str, Replica]) -> None:
    chance = random.Random(11)
    messages = [mutated(chance, checked(REQUEST).SerializeToString() if n % 2 else WHOLE) for n in range(400)]
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
