"""What a replica's process holds, by the kernel's own account.

Measured is `Rss` of /proc/self/smaps_rollup: all pages resident in the process, those of mapped files (the experts) and
of libraries among them. Start: all modules imported, nothing loaded. End: after dispatches to each of its experts.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch

from expertmesh.v1 import expert_pb2 as pb
from expertmesh.v1 import expert_pb2_grpc
from expertmesh.wire.channel import CHANNEL_OPTIONS, FINGERPRINT_KEY
from expertmesh.wire.tensors import encode

ROOT = Path(__file__).parents[2]
HIDDEN, INTERMEDIATE, LAYERS, EXPERTS = 1024, 1024, 4, 32
ROWS = 16

PROGRAM = """
import sys
from pathlib import Path
from expert_service.local import group_args, serve_replica

def rss():
    line = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("Rss:"))
    return int(line.split()[1]) * 1024

args = group_args(Path(sys.argv[1]), "g", sys.argv[2])
start = rss()
with serve_replica(args) as replica:
    print(replica.address, flush=True)
    sys.stdin.readline()
    print(replica.entry().expert_bytes, rss() - start, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def big_artifact(write_artifact: Callable[..., Path]) -> Iterator[Path]:
    path = write_artifact(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        layers=dict.fromkeys(range(LAYERS), EXPERTS),
        dtype="bfloat16",
    )
    yield path
    shutil.rmtree(path)


def dispatches(experts: list[int]) -> Iterator[pb.DispatchRequest]:
    """One request per expert and layer."""
    for number in range(LAYERS * len(experts)):
        layer, expert = number % LAYERS, experts[number // LAYERS]
        yield pb.DispatchRequest(
            id=number,
            layer=layer,
            hidden_states=encode(torch.ones(ROWS, HIDDEN).bfloat16()),
            pair_rows=encode(torch.arange(ROWS, dtype=torch.int32)),
            pair_experts=encode(torch.full((ROWS,), expert, dtype=torch.int32)),
            pair_weights=encode(torch.ones(ROWS)),
            output_dtype=pb.DTYPE_BFLOAT16,
        )


def test_a_replica_holds_its_own_experts_and_little_else(big_artifact: Path) -> None:
    held = range(8, 18)
    command = [sys.executable, "-c", PROGRAM, str(big_artifact), f"{held[0]}-{held[-1]}"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        with grpc.insecure_channel(process.stdout.readline().strip(), CHANNEL_OPTIONS) as channel:
            stub = expert_pb2_grpc.ExpertServiceStub(channel)
            answers = list(stub.Dispatch(dispatches(list(held)), metadata=((FINGERPRINT_KEY, "f" * 16),)))
            assert [answer.status.code for answer in answers] == [pb.CODE_OK] * (LAYERS * len(held))
            process.stdin.write("\n")
            process.stdin.flush()
            own, grown = map(int, process.stdout.readline().split())
        process.stdin.write("\n")
    assert own == LAYERS * len(held) * 3 * HIDDEN * INTERMEDIATE * 2
    print(f"own experts {own / 2**20:.0f} MiB, grown by {grown / 2**20:.0f} MiB: {grown / own:.3f}")
    assert own * 0.9 < grown <= own * 1.15
