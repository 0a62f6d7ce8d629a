"""Damaged and odd answers for the router's decoder in Python; native/tools/fuzz has the one in C++."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from google.protobuf.message import DecodeError
from request_bytes import HIDDEN, REQUEST, mutated

from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.checksum import answer_checksum, find_change
from expertmesh.wire.tensors import encode
from fuzz.run import Fault
from router_service.transport.grpc_transport import _to_answer
from router_service.transport.stream import Reply

BATCH = 1000
NUMBERS = [0, 1, 2, 3, HIDDEN, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
SUMS = [0.0, 1.0, -3e38, math.inf, math.nan]
ROWS = REQUEST.hidden_states.rows


def odd_answer(chance: random.Random) -> bytes:
    def usual() -> bool:
        return chance.random() < 0.9

    sums = torch.tensor(chance.choices(SUMS, k=ROWS * HIDDEN)).view(ROWS, HIDDEN)
    answer = pb.DispatchResponse(
        id=chance.getrandbits(64),
        status=pb.Status(
            code=pb.CODE_OK if usual() else pb.Code.ValueType(chance.randint(-1, 9)),
            message="" if usual() else "\0\n" * chance.choice([1, 10_000]),
        ),
        output=encode(sums if usual() else sums.to(chance.choice([torch.bfloat16, torch.float16, torch.int32]))),
        timings=pb.Timings(queue_us=chance.choice(NUMBERS), compute_us=chance.choice(NUMBERS)),
        load=pb.Load(queued_rows=chance.choice(NUMBERS), busy=math.nan, rows_total=2**64 - 1),
    )
    if not usual():
        answer.output.rows, answer.output.width = chance.choice(NUMBERS), chance.choice(NUMBERS)
    if not usual():
        answer.output.dtype = pb.DType.ValueType(chance.randint(-1, 6))
    if not usual():
        answer.output.data = chance.randbytes(chance.choice([0, 1, 4, 256, 60_000]))
    if not usual():
        answer.ClearField("output")
    if usual():
        answer.checksum = answer_checksum(answer) if usual() else chance.choice(NUMBERS)
    whole = answer.SerializeToString()
    return mutated(chance, whole) if chance.random() < 0.5 else whole


def verdict(message: bytes) -> str:
    """What the router makes of it."""
    try:
        response = pb.DispatchResponse.FromString(message)
    except DecodeError:
        return "no message"
    change = find_change(response)
    answer = _to_answer(REQUEST, Reply(response))
    if answer.code == pb.CODE_OK:
        output = answer.output
        if output is None or output.shape != (ROWS, HIDDEN) or output.dtype != torch.float32:
            raise Fault(f"{message.hex()[:4000]}: taken, but not what was asked for")
    return "not believed with checksums" if change else f"code {answer.code}"


class Answers:
    limit_mib = 64

    def __init__(self) -> None:
        self.pid = os.getpid()

    def batch(self, chance: random.Random) -> Counter[str]:
        return Counter(verdict(odd_answer(chance)) for _ in range(BATCH))


@contextmanager
def answers(folder: Path) -> Iterator[Answers]:
    yield Answers()
