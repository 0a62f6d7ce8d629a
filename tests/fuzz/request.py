"""Damaged and odd dispatches for both of the replica's servers, which must say the same."""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from mesh import group_args
from request_bytes import HIDDEN, asked, floats, ints, is_hasty, mutated
from tiny_models import EXPERTS, make_checkpoint

from expert_service.replica import Replica
from expertmesh.artifact.prepare import prepare
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.checksum import request_checksum
from expertmesh.wire.tensors import decode, encode
from fuzz.run import Fault, Hang

BATCH = 64
NUMBERS = [0, 1, 2, 3, 4, HIDDEN, 8192, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
INDICES = [0, 0, 1, 1, 2, 3, EXPERTS // 2, EXPERTS, -1, 2**31 - 1, -(2**31)]
WEIGHTS = [0.0, -0.0, 0.25, 1.0, -1.0, 1e-45, 3e38, -3e38, math.inf, -math.inf, math.nan]
ROW_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def odd_request(chance: random.Random) -> bytes:
    """Well-formed; each of its parts is usual more often than not."""

    def usual(probability: float = 0.9) -> bool:
        return chance.random() < probability

    rows, pairs = chance.choice([0, 1, 2, 5]), chance.choice([0, 1, 3, 8])
    hidden_states = torch.tensor(chance.choices(WEIGHTS, k=rows * HIDDEN)).view(rows, HIDDEN)
    if usual():
        hidden_states = torch.linspace(-1, 1, rows * HIDDEN).view(rows, HIDDEN)
    request = pb.DispatchRequest(
        id=chance.getrandbits(64),
        layer=chance.choice([0, 1]) if usual() else chance.choice(NUMBERS),
        hidden_states=encode(hidden_states.to(chance.choice(ROW_DTYPES))),
        pair_rows=ints(*(chance.randrange(max(1, rows)) if usual() else chance.choice(INDICES) for _ in range(pairs))),
        pair_experts=ints(*(chance.randrange(4) if usual(0.95) else chance.choice(INDICES) for _ in range(pairs))),
        pair_weights=floats(*chance.choices(WEIGHTS, k=pairs)),
        output_dtype=pb.DType.ValueType(chance.choice([1, 2, 3]) if usual() else chance.randint(-1, 6)),
        timeout_us=0 if usual() else chance.choice([10**9, 2**63, 2**64 - 1]),
    )
    for tensor in (request.hidden_states, request.pair_rows, request.pair_experts, request.pair_weights):
        if not usual(0.95):
            tensor.rows = chance.choice(NUMBERS)
        if not usual(0.95):
            tensor.width = chance.choice(NUMBERS)
        if not usual(0.95):
            tensor.data = chance.randbytes(chance.choice([0, 1, 3, 4, 256, 60_000]))
    if not usual(0.5):
        request.checksum = request_checksum(request) if usual() else chance.choice(NUMBERS)
    return request.SerializeToString()


def message(chance: random.Random) -> bytes:
    kind = chance.randrange(8)
    if kind == 0:
        return chance.randbytes(2 ** chance.randrange(12))
    return mutated(chance, odd_request(chance)) if kind < 4 else odd_request(chance)


def comparable(answer: tuple[object, ...]) -> tuple[object, ...]:
    """What is no number has many patterns of bits."""
    if len(answer) == 2 or not isinstance(output := answer[3], bytes):
        return answer
    tensor = pb.Tensor.FromString(output)
    if tensor.data:
        tensor.CopyFrom(encode(torch.nan_to_num(decode(tensor), math.nan, math.inf, -math.inf)))
    return *answer[:3], tensor.SerializeToString(), answer[4]


class Requests:
    limit_mib = 96

    def __init__(self, replicas: dict[str, Replica], runner: asyncio.Runner) -> None:
        self.pid = os.getpid()
        self._runner = runner
        self._replicas = replicas

    def batch(self, chance: random.Random) -> Counter[str]:
        messages = [one for one in (message(chance) for _ in range(BATCH)) if not is_hasty(one)]
        answers: dict[str, list[tuple[object, ...]]] = {}
        for name, replica in self._replicas.items():
            try:
                answers[name] = [comparable(answer) for answer in self._runner.run(asked(replica, messages))]
            except TimeoutError:
                raise Hang(f"{name}: no answer within 60 s") from None
            if (problem := replica.problem()) is not None:
                raise Fault(f"{name}: {problem}")
        for sent, one, other in zip(messages, answers["python"], answers["native"], strict=True):
            if one != other:
                raise Fault(f"{sent.hex()}: python {one}, native {other}"[:4000])
        return Counter(code(answer) for answer in answers["native"])


def code(answer: tuple[object, ...]) -> str:
    return str(answer[0]) if len(answer) == 2 else pb.Code.Name(pb.Code.ValueType(int(str(answer[1]))))


@contextmanager
def requests(folder: Path) -> Iterator[Requests]:
    artifact = folder / "artifact"
    prepare(make_checkpoint("mixtral", folder / "checkpoint"), artifact)
    with ExitStack() as stack:
        runner, replicas = stack.enter_context(asyncio.Runner()), {}
        for transport in ("python", "native"):
            args = group_args(artifact, "", "g", set(range(EXPERTS // 2)), transport=transport)
            replicas[transport] = Replica(args, None)
            stack.callback(replicas[transport].stop)
        yield Requests(replicas, runner)
