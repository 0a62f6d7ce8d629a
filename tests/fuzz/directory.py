"""Hostile announcements, decisions and questions for a directory in a process of its own."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError, Message
from request_bytes import tag, varint

from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import expert_pb2
from expertmesh.wire.channel import CHANNEL_OPTIONS
from fuzz.run import Fault, Hang

BATCH = 64
BIG = 2**20
NUMBERS = [0, 1, 2, 7, 1000, 2**16, 2**31 - 1, 2**32 - 1]
COUNTERS = [0, 1, 10**6, 2**53, 2**63, 2**64 - 1]
FLOATS = [0.0, -0.0, 0.5, 1.0, -1.0, 60.0, 600.0, 1e300, -1e300, math.inf, -math.inf, math.nan]
EXPECTED = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}


def text(chance: random.Random, prefix: str) -> str:
    if chance.random() < 0.004:
        return prefix * BIG
    return chance.choice([f"{prefix}{chance.randrange(200)}"] * 12 + ["", "\0\n\x1b[2J", "\u202e\U0001f9e8", "x" * 501])


def experts(chance: random.Random) -> list[int]:
    if chance.random() < 0.001:
        return list(range(2**18))
    few = chance.choices(NUMBERS, k=chance.randrange(6))
    return few if chance.random() < 0.2 else sorted(set(few))


def float32(chance: random.Random) -> float:
    return (
        min(max(chance.choice(FLOATS), -3e38), 3e38) if chance.random() < 0.5 else chance.choice([math.nan, math.inf])
    )


def announcement(chance: random.Random) -> pb.AnnounceRequest:
    layers = [
        expert_pb2.LayerExperts(
            layer=number if chance.random() < 0.9 else chance.choice(NUMBERS), experts=experts(chance)
        )
        for number in range(chance.choice([0, 1, 2, 2, 2, 2, 4, 300]))
    ]
    replica = pb.Replica(
        replica_id=text(chance, "r"),
        group=text(chance, "g"),
        address=text(chance, "a"),
        fingerprint=text(chance, "f") if chance.random() < 0.2 else "f",
        layers=layers,
        state=expert_pb2.ReplicaState.ValueType(chance.choice([0, 1, 2, 2, 2, 2, 3, 77, -1])),
        load=expert_pb2.Load(
            queued_rows=chance.choice(NUMBERS),
            busy=float32(chance),
            rows_total=chance.choice(COUNTERS),
            rows_per_s=float32(chance),
        ),
        node_id=text(chance, "n"),
        pid=chance.choice(NUMBERS),
        expert_bytes=chance.choice(COUNTERS),
        started_at=chance.choice(FLOATS),
        queue_wait=pb.QueueWait(p50_us=chance.choice(NUMBERS), p95_us=chance.choice(NUMBERS)),
    )
    rows = [
        pb.LayerRows(layer=one.layer, experts=one.experts, rows=[chance.choice(COUNTERS[:3])] * len(one.experts))
        for one in layers
    ]
    if chance.random() < 0.1:
        rows = [pb.LayerRows(layer=chance.choice(NUMBERS), experts=experts(chance), rows=chance.choices(COUNTERS, k=3))]
    lease_ms = chance.choice([0, 1, 100, 1000, 600_000, 600_000, 600_001, 2**32 - 1])
    return pb.AnnounceRequest(replica=replica, lease_ms=lease_ms, expert_rows=rows if chance.random() < 0.5 else [])


def decision(chance: random.Random) -> pb.ScalingDecision:
    counts = {
        name: chance.choice(NUMBERS)
        for name in ("running", "target_before", "asked", "target", "counted", "min_replicas", "max_replicas")
    }
    return pb.ScalingDecision(
        group=text(chance, "g"),
        decided_at=chance.choice(FLOATS),
        busy=float32(chance),
        queue_wait_ms=float32(chance),
        reason=text(chance, "because"),
        error=text(chance, "failed") if chance.random() < 0.2 else "",
        **counts,
    )


def request(chance: random.Random) -> tuple[str, Message]:
    kind = chance.randrange(12)
    if kind < 5:
        return "Announce", announcement(chance)
    if kind < 8:
        return "ReportDecision", decision(chance)
    if kind == 8:
        return "Want", pb.WantRequest(layer=chance.choice(NUMBERS), experts=experts(chance))
    if kind == 9:
        return "ExpertLoad", pb.ExpertLoadRequest(window_s=chance.choice(FLOATS))
    if kind == 10:
        return "Withdraw", pb.WithdrawRequest(replica_id=text(chance, "r"))
    return "Scaling", pb.ScalingRequest()


def with_unknown(chance: random.Random, message: Message) -> bytes:
    size = BIG if chance.random() < 0.1 else 10
    return message.SerializeToString() + tag(99, 2) + varint(size) + bytes(size)


def damaged(chance: random.Random, message: bytes) -> bytes:
    out = bytearray(message)
    for _ in range(chance.randint(1, 4) if out else 0):
        out[chance.randrange(len(out))] = chance.randrange(256)
    return bytes(out[: chance.randint(0, len(out))] if chance.random() < 0.3 else out)


def is_message(like: Message, sent: bytes) -> bool:
    try:
        type(like).FromString(sent)
    except DecodeError:
        return False
    return True


class DirectoryRequests:
    limit_mib = 256

    def __init__(self, process: subprocess.Popen[str], channel: grpc.Channel) -> None:
        self.pid = process.pid
        self._process = process
        self._channel = channel

    def batch(self, chance: random.Random) -> Counter[str]:
        answers = Counter(self._one(chance) for _ in range(BATCH))
        for method in ("List", "Scaling"):
            if self._ask(method, b"") != grpc.StatusCode.OK:
                raise Fault(f"{method} is refused after the batch")
        if self._ask("Watch", b"", stream=True) != grpc.StatusCode.OK:
            raise Fault("Watch is refused after the batch")
        return answers

    def _one(self, chance: random.Random) -> str:
        method, message = request(chance)
        whole = message.SerializeToString()
        kind = chance.randrange(10)
        sent = damaged(chance, whole) if kind == 0 else with_unknown(chance, message) if kind == 1 else whole
        status = self._ask(method, sent)
        # gRPC for Python says UNKNOWN to what is no message
        if status not in EXPECTED and (status != grpc.StatusCode.UNKNOWN or is_message(message, sent)):
            raise Fault(f"{method} {sent[:500].hex()}: {status}")
        return str(status)

    def _ask(self, method: str, message: bytes, stream: bool = False) -> grpc.StatusCode:
        path = f"/expertmesh.v1.DirectoryService/{method}"
        try:
            if stream:
                next(tables := self._channel.unary_stream(path)(message, timeout=30))
                tables.cancel()
            else:
                self._channel.unary_unary(path)(message, timeout=30)
        except grpc.RpcError as error:
            code = error.code()
            if self._process.poll() is not None:
                raise Fault(f"{method} {message[:500].hex()}: the directory ended") from None
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise Hang(f"{method} {message[:500].hex()}: no answer within 30 s") from None
            return code
        return grpc.StatusCode.OK


@contextmanager
def directory(folder: Path) -> Iterator[DirectoryRequests]:
    command = [sys.executable, "-m", "expertmesh.directory"]
    with (
        (folder / "directory.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            with grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel:
                yield DirectoryRequests(process, channel)
        finally:
            process.kill()
