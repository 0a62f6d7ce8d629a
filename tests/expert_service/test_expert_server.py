from __future__ import annotations

import asyncio
import random
import re
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from mesh import TRANSPORTS

from expert_service.executor import Executor, Pairs
from expert_service.local import group_args, serve_replica
from expert_service.replica import Replica
from expertmesh.artifact.experts import load_experts
from expertmesh.artifact.function import expert_forward
from expertmesh.artifact.manifest import read_manifest
from expertmesh.errors import ArtifactError, ClusterError, ConfigError
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.v1 import expert_pb2_grpc
from expertmesh.wire.channel import CHANNEL_OPTIONS, FINGERPRINT_KEY
from expertmesh.wire.tensors import decode, encode

FINGERPRINT = ((FINGERPRINT_KEY, "f" * 16),)
SERVICE = "expertmesh.v1.ExpertService"


def ints(*values: int) -> pb.Tensor:
    return encode(torch.tensor(values, dtype=torch.int32))


def floats(*values: float) -> pb.Tensor:
    return encode(torch.tensor(values, dtype=torch.float32))


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


def request(request_id: int = 1, **changed: Any) -> pb.DispatchRequest:
    """Three rows to experts 1, 3 and 2 of layer 1, the second row to none."""
    fields: dict[str, Any] = {
        "id": request_id,
        "layer": 1,
        "hidden_states": encode(rows(3)),
        "pair_rows": ints(0, 0, 2),
        "pair_experts": ints(1, 3, 2),
        "pair_weights": floats(0.25, 0.5, 1.0),
        "output_dtype": pb.DTYPE_FLOAT32,
    }
    return pb.DispatchRequest(**(fields | changed))


def expected(artifact: Path) -> torch.Tensor:
    manifest = read_manifest(artifact)
    held = load_experts(artifact, manifest, 1, range(4))
    y = [expert_forward(rows(3), held[index], manifest.expert_function) for index in range(4)]
    return torch.stack([0.25 * y[1][0] + 0.5 * y[3][0], torch.zeros(16), y[2][2]])


@pytest.fixture(scope="module", params=TRANSPORTS)
def replica(artifact: Path, request: pytest.FixtureRequest) -> Iterator[Replica]:
    with serve_replica(group_args(artifact, "g", "0-3", transport=request.param)) as serving:
        yield serving


@asynccontextmanager
async def stub_of(address: str) -> AsyncIterator[expert_pb2_grpc.ExpertServiceAsyncStub]:
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        yield expert_pb2_grpc.ExpertServiceStub(channel)


async def exchange(call: Any, *requests: pb.DispatchRequest) -> dict[int, pb.DispatchResponse]:
    """Sends all, then reads as many answers."""
    for each in requests:
        await call.write(each)
    async with asyncio.timeout(60):
        answers = [await call.read() for _ in requests]
    return {answer.id: answer for answer in answers}


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def test_answers_weighted_partial_sums_with_timings_and_load(artifact: Path, replica: Replica) -> None:
    async def test() -> None:
        async with stub_of(replica.address) as stub:
            call = stub.Dispatch(metadata=FINGERPRINT)
            before = replica.load().rows_total
            answer = (await exchange(call, request(7)))[7]
            assert answer.status == pb.Status(code=pb.CODE_OK)
            torch.testing.assert_close(decode(answer.output), expected(artifact), atol=1e-6, rtol=1e-6)
            assert answer.timings.batch_rows == 3 and answer.timings.compute_us > 0
            assert answer.load.rows_total == before + 3 and answer.load.rows_per_s > 0
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            assert await call.code() == grpc.StatusCode.OK

    run(test)


def test_rows_come_back_in_the_type_asked_for(artifact: Path, replica: Replica) -> None:
    async def test() -> None:
        async with stub_of(replica.address) as stub:
            call = stub.Dispatch(metadata=FINGERPRINT)
            asked = request(1, output_dtype=pb.DTYPE_BFLOAT16, hidden_states=encode(rows(3).half()))
            output = decode((await exchange(call, asked))[1].output)
            assert output.dtype == torch.bfloat16
            torch.testing.assert_close(output.float(), expected(artifact), atol=2e-2, rtol=2e-2)

    run(test)


def test_nothing_asked_is_answered_with_zeros(replica: Replica) -> None:
    async def test() -> None:
        no_pairs = {"pair_rows": ints(), "pair_experts": ints(), "pair_weights": floats()}
        async with stub_of(replica.address) as stub:
            call = stub.Dispatch(metadata=FINGERPRINT)
            nothing = request(2, hidden_states=encode(torch.empty(0, 16)), **no_pairs)
            answers = await exchange(call, request(1, **no_pairs), nothing)
            assert decode(answers[1].output).tolist() == [[0.0] * 16] * 3
            assert (answers[2].output.rows, answers[2].output.width) == (0, 16)

    run(test)


SHORT = pb.Tensor(dtype=pb.DTYPE_FLOAT32, rows=3, width=16, data=b"\0" * 100)
HUGE = pb.Tensor(dtype=pb.DTYPE_FLOAT32, rows=2**32 - 1, width=2**32 - 1)
EMPTY_BUT_MANY = pb.Tensor(dtype=pb.DTYPE_FLOAT32, rows=2**32 - 1, width=0)
INVALID = {
    "bytes missing": ({"hidden_states": SHORT}, "hidden_states: 3 x 16 torch.float32 takes 192 bytes, got 100"),
    "claims too much": ({"hidden_states": HUGE}, "got 0"),
    "rows of no width": ({"hidden_states": EMPTY_BUT_MANY}, "width 0, the model's hidden size is 16"),
    "no dtype": ({"hidden_states": pb.Tensor(rows=3, width=16)}, "hidden_states: unknown dtype 0"),
    "integers": ({"hidden_states": encode(torch.ones(3, 16, dtype=torch.int32))}, "no floating-point type"),
    "another width": ({"hidden_states": encode(torch.ones(3, 8))}, "width 8, the model's hidden size is 16"),
    "too many rows": ({"hidden_states": encode(torch.ones(8193, 16))}, "8193 rows, at most 8192"),
    "no hidden states": ({"hidden_states": None}, "unknown dtype 0"),
    "row beyond": ({"pair_rows": ints(0, 0, 3)}, "pair_rows: 0 to 3, but hidden_states has 3 rows"),
    "row negative": ({"pair_rows": ints(0, -1, 2)}, "pair_rows: -1 to 2"),
    "expert negative": ({"pair_experts": ints(1, -2, 2)}, "expert -2 cannot exist"),
    "columns differ": ({"pair_weights": floats(1.0)}, "have 3, 3 and 1 rows"),
    "weights as ints": ({"pair_weights": ints(1, 1, 1)}, "pair_weights: dtype 4, DTYPE_FLOAT32 is expected"),
    "rows as floats": ({"pair_rows": floats(0, 0, 2)}, "pair_rows: dtype 1, DTYPE_INT32 is expected"),
    "no column": ({"pair_rows": encode(torch.zeros(1, 3, dtype=torch.int32))}, "pair_rows: 1 x 3 in 12 bytes"),
    "column cut": ({"pair_rows": pb.Tensor(dtype=4, rows=3, width=1, data=b"\0" * 11)}, "3 x 1 in 11 bytes"),
    "too many pairs": (
        {name: encode(torch.zeros(16385, dtype=dtype)) for name, dtype in
         [("pair_rows", torch.int32), ("pair_experts", torch.int32), ("pair_weights", torch.float32)]},
        "16385 pairs, at most 16384",
    ),
    "no output type": ({"output_dtype": pb.DTYPE_UNSPECIFIED}, "output_dtype 0"),
    "output as ints": ({"output_dtype": pb.DTYPE_INT32}, "output_dtype 4"),
    "unknown output type": ({"output_dtype": 99}, "output_dtype 99"),
}  # fmt: skip
ABSENT = {
    "expert held elsewhere": ({"pair_experts": ints(1, 5, 2)}, "layer 1: expert 5 is not held here"),
    "expert beyond": ({"pair_experts": ints(1, 2**31 - 1, 2)}, "expert 2147483647 is not held here"),
    "dense layer": ({"layer": 2}, "layer 2 is not served here .layers: 1,3."),
}


@pytest.mark.parametrize(
    ("changed", "wrong", "code"),
    [(*case, pb.CODE_INVALID_ARGUMENT) for case in INVALID.values()]
    + [(*case, pb.CODE_NOT_FOUND) for case in ABSENT.values()],
    ids=[*INVALID, *ABSENT],
)
def test_a_bad_request_is_answered_in_band_and_the_stream_lives_on(
    artifact: Path, replica: Replica, changed: dict[str, Any], wrong: str, code: pb.Code.ValueType
) -> None:
    async def test() -> None:
        async with stub_of(replica.address) as stub:
            call = stub.Dispatch(metadata=FINGERPRINT)
            answers = await exchange(call, request(1, **changed), request(2))
            assert answers[1].status.code == code
            assert re.search(wrong, answers[1].status.message)
            assert not answers[1].HasField("output") and "\n" not in answers[1].status.message
            torch.testing.assert_close(decode(answers[2].output), expected(artifact), atol=1e-6, rtol=1e-6)

    run(test)


def test_mutated_messages_never_break_the_server(artifact: Path, replica: Replica) -> None:
    async def test() -> None:
        chance = random.Random(5)
        original = request().SerializeToString()
        async with grpc.aio.insecure_channel(replica.address) as channel:
            raw = channel.stream_stream(f"/{SERVICE}/Dispatch")
            for _ in range(150):
                message = bytearray(original)
                for _ in range(chance.randint(1, 4)):
                    message[chance.randrange(len(message))] = chance.randrange(256)
                call = raw(metadata=FINGERPRINT)
                try:
                    await call.write(bytes(message))
                    await call.done_writing()
                    async with asyncio.timeout(60):
                        await call.read()
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    continue
        async with stub_of(replica.address) as stub:
            answer = (await exchange(stub.Dispatch(metadata=FINGERPRINT), request()))[1]
            torch.testing.assert_close(decode(answer.output), expected(artifact), atol=1e-6, rtol=1e-6)
        assert replica.problem() is None

    run(test)


@pytest.mark.parametrize(("metadata", "asked"), [(((FINGERPRINT_KEY, "other"),), "other"), ((), "none")])
def test_another_fingerprint_is_refused_naming_both(
    replica: Replica, metadata: tuple[tuple[str, str], ...], asked: str
) -> None:
    async def test() -> None:
        async with stub_of(replica.address) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Dispatch(metadata=metadata).read()
            assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            details = refused.value.details() or ""
            assert "f" * 16 in details and details.endswith(f"asks for {asked}") and "\n" not in details

    run(test)


def test_describe_says_what_is_served(replica: Replica) -> None:
    async def test() -> None:
        async with stub_of(replica.address) as stub:
            told = await stub.Describe(pb.DescribeRequest())
        assert (told.group, told.fingerprint, told.hidden_size, told.dtype) == ("g", "f" * 16, 16, pb.DTYPE_FLOAT32)
        assert {held.layer: list(held.experts) for held in told.layers} == {1: [0, 1, 2, 3], 3: [0, 1, 2, 3]}
        assert told.state == pb.REPLICA_STATE_READY and told.protocol_version == 1
        assert (told.limits.max_rows, told.limits.max_queued_rows) == (8192, 65536)

    run(test)


def test_health_and_reflection_answer(replica: Replica) -> None:
    with grpc.insecure_channel(replica.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            status = health.Check(health_pb2.HealthCheckRequest(service=name)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        assert SERVICE in ProtoReflectionDescriptorDatabase(channel).get_services()


class Gate(Executor):
    """Holds every batch back until it is opened, and counts those that began."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.opened = threading.Event()
        self.began = threading.Semaphore(0)

    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        self.began.release()
        assert self.opened.wait(60)
        return self.inner.run(layer, hidden_states, pairs)


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def gated(artifact: Path, transport: str, request: pytest.FixtureRequest) -> Iterator[tuple[Replica, Gate]]:
    """A replica of its own whose executor waits for the test; a parameter sets max_queued_rows."""
    args = group_args(artifact, "g", "0-3", max_queued_rows=getattr(request, "param", 64), transport=transport)
    with serve_replica(args) as serving:
        gate = Gate(serving.endpoint.executor)
        serving.endpoint.executor = gate
        yield serving, gate
        gate.opened.set()


async def queued(replica: Replica, count: int) -> None:
    async with asyncio.timeout(60):
        while replica.load().queued_rows != count:
            await asyncio.sleep(0.005)


def test_streams_of_two_routers_share_a_batch(artifact: Path, gated: tuple[Replica, Gate]) -> None:
    async def test() -> None:
        replica, gate = gated
        async with stub_of(replica.address) as one, stub_of(replica.address) as other:
            calls = [stub.Dispatch(metadata=FINGERPRINT) for stub in (one, other)]
            await calls[0].write(request(1))
            await asyncio.to_thread(gate.began.acquire)
            await calls[0].write(request(2))
            await calls[1].write(request(2))
            await queued(replica, 6)
            gate.opened.set()
            answers = [await calls[0].read(), await calls[0].read(), await calls[1].read()]
            assert [answer.timings.batch_rows for answer in answers] == [3, 6, 6]
            for answer in answers:
                torch.testing.assert_close(decode(answer.output), expected(artifact), atol=1e-6, rtol=1e-6)

    run(test)


@pytest.mark.parametrize("gated", [6], indirect=True)
def test_a_full_queue_pushes_back_in_band(gated: tuple[Replica, Gate]) -> None:
    async def test() -> None:
        replica, gate = gated
        async with stub_of(replica.address) as stub:
            call = stub.Dispatch(metadata=FINGERPRINT)
            await call.write(request(1))
            await asyncio.to_thread(gate.began.acquire)
            for number in (2, 3, 4):
                await call.write(request(number))
            refused = await call.read()
            assert (refused.id, refused.status.code) == (4, pb.CODE_RESOURCE_EXHAUSTED)
            assert "6 rows wait in a queue for 6" in refused.status.message
            assert refused.load.queued_rows == 6
            gate.opened.set()
            assert {(await call.read()).status.code for _ in range(3)} == {pb.CODE_OK}
            assert (await exchange(call, request(5)))[5].status.code == pb.CODE_OK

    run(test)


@pytest.mark.parametrize("gated", [6], indirect=True)
def test_a_router_that_fills_the_queue_keeps_no_other_out_and_takes_turns(gated: tuple[Replica, Gate]) -> None:
    async def test() -> None:
        replica, gate = gated
        async with stub_of(replica.address) as one, stub_of(replica.address) as other:
            flood, modest = one.Dispatch(metadata=FINGERPRINT), other.Dispatch(metadata=FINGERPRINT)
            await flood.write(request(1))
            await asyncio.to_thread(gate.began.acquire)
            for number in (2, 3, 4):
                await flood.write(request(number))
            assert (await flood.read()).id == 4
            await modest.write(request(5))
            await queued(replica, 9)
            await modest.write(request(6))  # more than its half of the queue
            refused = await modest.read()
            assert (refused.id, refused.status.code) == (6, pb.CODE_RESOURCE_EXHAUSTED)
            gate.opened.set()
            answers = [await flood.read(), await flood.read(), await flood.read(), await modest.read()]
            assert {answer.status.code for answer in answers} == {pb.CODE_OK}
            batches = {answer.id: answer.timings.batch_rows for answer in answers}
            assert batches == {1: 3, 2: 6, 5: 6, 3: 3}  # in order of arrival 3 would share a batch with 2

    run(test)


def test_a_timeout_that_passes_in_the_queue_is_answered_without_computing(gated: tuple[Replica, Gate]) -> None:
    async def test() -> None:
        replica, gate = gated
        async with stub_of(replica.address) as stub:
            call = stub.Dispatch(metadata=FINGERPRINT)
            await call.write(request(1))
            await asyncio.to_thread(gate.began.acquire)
            await call.write(request(2, timeout_us=1000))
            await queued(replica, 3)
            await asyncio.sleep(0.05)
            gate.opened.set()
            codes = {answer.id: answer.status.code for answer in [await call.read(), await call.read()]}
            assert codes == {1: pb.CODE_OK, 2: pb.CODE_DEADLINE_EXCEEDED}
            assert replica.load().rows_total == 3

    run(test)


def test_rows_of_a_cancelled_stream_are_not_computed(gated: tuple[Replica, Gate]) -> None:
    async def test() -> None:
        replica, gate = gated
        async with stub_of(replica.address) as stub:
            leaving, staying = stub.Dispatch(metadata=FINGERPRINT), stub.Dispatch(metadata=FINGERPRINT)
            await staying.write(request(1))
            await asyncio.to_thread(gate.began.acquire)
            await leaving.write(request(1))
            await queued(replica, 3)
            leaving.cancel()
            async with asyncio.timeout(60):
                while replica.endpoint.streams().count > 1:
                    await asyncio.sleep(0.005)
            gate.opened.set()
            await staying.read()
            assert (await exchange(staying, request(2)))[2].timings.batch_rows == 3
            assert replica.load().rows_total == 6

    run(test)


def test_a_computation_that_fails_is_answered_and_the_replica_lives_on(gated: tuple[Replica, Gate]) -> None:
    class Fails(Executor):
        def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
            raise ValueError("no memory left")

    async def test() -> None:
        replica, gate = gated
        gate.opened.set()
        inner, gate.inner = gate.inner, Fails()
        async with stub_of(replica.address) as stub:
            call = stub.Dispatch(metadata=FINGERPRINT)
            failed = (await exchange(call, request(1)))[1].status
            assert (failed.code, failed.message) == (pb.CODE_INTERNAL, "ValueError: no memory left")
            gate.inner = inner
            assert (await exchange(call, request(2)))[2].status.code == pb.CODE_OK
        assert replica.problem() is None

    run(test)


def test_draining_answers_what_waits_and_what_still_comes(artifact: Path, gated: tuple[Replica, Gate]) -> None:
    async def test() -> None:
        replica, gate = gated
        async with stub_of(replica.address) as stub:
            call = stub.Dispatch(metadata=FINGERPRINT)
            await call.write(request(1))
            await asyncio.to_thread(gate.began.acquire)
            drained = asyncio.create_task(asyncio.to_thread(replica.drain, 30))
            async with asyncio.timeout(60):
                while (await stub.Describe(pb.DescribeRequest())).state != pb.REPLICA_STATE_DRAINING:
                    await asyncio.sleep(0.005)
            with grpc.insecure_channel(replica.address) as channel:
                health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
                assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
            await call.write(request(2))
            assert not drained.done()
            gate.opened.set()
            answers = {answer.id: answer for answer in [await call.read(), await call.read()]}
            assert {answer.status.code for answer in answers.values()} == {pb.CODE_OK} and set(answers) == {1, 2}
            await drained
            await asyncio.to_thread(replica.stop)
            assert await call.read() is grpc.aio.EOF
            assert await call.code() == grpc.StatusCode.OK

    run(test)


def test_a_port_range_gives_the_next_free_port_and_says_when_none_is_left(artifact: Path, transport: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        args = group_args(artifact, "g", "0-3", ports=(port, port), transport=transport)
        with pytest.raises(ClusterError, match=f"every port from {port} to {port} is in use on 127.0.0.1"):
            Replica(args, None)
        with serve_replica(args.model_copy(update={"ports": (port, port + 20)})) as first:
            assert port < int(first.address.split(":")[1]) <= port + 20


def test_what_cannot_be_served_is_named(artifact: Path, tmp_path: Path) -> None:
    args = group_args(artifact, "g", "0-3")
    with pytest.raises(ArtifactError, match="no artifact here"):
        Replica(args.model_copy(update={"artifact": str(tmp_path)}), None)
    with pytest.raises(ConfigError, match="layer 3 has experts 0-3, not 4"):
        Replica(args.model_copy(update={"experts": {3: "0-4"}}), None)


def test_a_caller_that_reads_nothing_is_not_read_from(gated: tuple[Replica, Gate]) -> None:
    async def test() -> None:
        replica, gate = gated
        gate.opened.set()
        wide = request(hidden_states=encode(rows(60)))
        async with stub_of(replica.address) as stub:
            call = stub.Dispatch(metadata=FINGERPRINT)
            sent = 0

            async def write_on() -> None:
                nonlocal sent
                for sent in range(100_000):
                    wide.id = sent
                    await call.write(wide)

            writing = asyncio.create_task(write_on())
            before = -1
            async with asyncio.timeout(60):
                while sent != before:
                    before = sent
                    await asyncio.sleep(0.5)
            assert 0 < replica.endpoint.streams().open_rows <= 2 * 64 + 60
            writing.cancel()

    run(test)


def test_expert_rows_are_counted_for_scaling(artifact: Path, transport: str) -> None:
    async def test(replica: Replica) -> None:
        async with stub_of(replica.address) as stub:
            await exchange(stub.Dispatch(metadata=FINGERPRINT), request(1), request(2))

    with serve_replica(group_args(artifact, "g", "0-3", transport=transport)) as replica:
        asyncio.run(test(replica))
        assert replica.expert_rows() == {1: [0, 2, 2, 2, 0, 0], 3: [0] * 4}


class Stuck(Executor):
    """Computes nothing until it is let go."""

    def __init__(self) -> None:
        self.began, self.let_go = threading.Event(), threading.Event()

    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        self.began.set()
        assert self.let_go.wait(60)
        return hidden_states


def test_the_queue_wait_of_a_replica_that_hangs_grows(artifact: Path, transport: str) -> None:
    async def test(replica: Replica, stuck: Stuck) -> None:
        assert replica.queue_wait() == (0, 0)
        async with stub_of(replica.address) as stub:
            call = stub.Dispatch(metadata=FINGERPRINT)
            await call.write(request(1))
            await asyncio.to_thread(stuck.began.wait)
            await call.write(request(2))
            async with asyncio.timeout(60):
                while replica.queue_wait()[1] < 1_500_000:
                    await asyncio.sleep(0.05)
            assert replica.entry().queue_wait.p50_us >= 1_500_000 and replica.load().queued_rows == 3
            stuck.let_go.set()
            async with asyncio.timeout(60):
                assert {(await call.read()).id for _ in range(2)} == {1, 2}
        assert replica.queue_wait()[1] >= 1_500_000 * 15 / 16, "taken a moment ago, after so long"

    with serve_replica(group_args(artifact, "g", "0-3", transport=transport)) as replica:
        replica.endpoint.executor = stuck = Stuck()
        asyncio.run(test(replica, stuck))
