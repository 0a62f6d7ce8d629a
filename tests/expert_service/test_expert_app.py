"""Through real Ray Serve: a group and the directory as applications."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch

from expert_service.app import build
from expert_service.local import group_args
from expertmesh.args import (
    DIRECTORY_APPLICATION,
    DIRECTORY_DEPLOYMENT,
    DIRECTORY_ROUTE_PREFIX,
    EXPERTS_DEPLOYMENT,
    experts_application,
)
from expertmesh.directory import app as directory_app
from expertmesh.directory.client import list_table, watch
from expertmesh.v1 import directory_pb2, directory_pb2_grpc, expert_pb2_grpc
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.channel import CHANNEL_OPTIONS, FINGERPRINT_KEY
from expertmesh.wire.tensors import encode

pytestmark = pytest.mark.cluster

PATIENCE_S = 120.0
GROUP = "app-test"
APPLICATION = experts_application(GROUP)


@pytest.fixture(scope="module")
def directory(ray_cluster: Any) -> Iterator[str]:
    """Address of the directory, behind Serve's proxy."""
    from ray import serve

    mine = DIRECTORY_APPLICATION not in serve.status().applications
    if mine:
        serve.run(directory_app.build({}), name=DIRECTORY_APPLICATION, route_prefix=DIRECTORY_ROUTE_PREFIX)
    yield f"127.0.0.1:{ray_cluster.grpc_port}"
    if mine:
        serve.delete(DIRECTORY_APPLICATION)


def deploy(artifact: Path, directory: str, replicas: int) -> None:
    """What a Serve config with a `deployments:` override does; the session's cluster may have no CPU left."""
    from ray import serve

    args = group_args(artifact, GROUP, "0-3", directory=directory, lease_ms=1500)
    deployment = build(args.model_dump())._bound_deployment
    overridden = deployment.options(num_replicas=replicas, ray_actor_options={"num_cpus": 0})
    serve.run(overridden.bind(args), name=APPLICATION, route_prefix=None)


def until(directory: str, condition: Callable[[list[directory_pb2.Replica]], bool]) -> list[directory_pb2.Replica]:
    """The group's replicas once the condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = [replica for replica in list_table(directory, 30).replicas if replica.group == GROUP]
        if condition(found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {PATIENCE_S} s; last: {found}")


def request(number: int) -> pb.DispatchRequest:
    return pb.DispatchRequest(
        id=number,
        layer=1,
        hidden_states=encode(torch.ones(1, 16)),
        pair_rows=encode(torch.tensor([0], dtype=torch.int32)),
        pair_experts=encode(torch.tensor([2], dtype=torch.int32)),
        pair_weights=encode(torch.tensor([1.0])),
        output_dtype=pb.DTYPE_FLOAT32,
    )


def test_a_group_announces_serves_recovers_and_drains(artifact: Path, directory: str) -> None:
    from ray import serve

    deploy(artifact, directory, replicas=1)
    (first,) = until(directory, lambda found: len(found) == 1 and found[0].state == pb.REPLICA_STATE_READY)
    assert first.fingerprint == "f" * 16 and first.node_id and first.expert_bytes > 0
    assert {held.layer: list(held.experts) for held in first.layers} == {1: [0, 1, 2, 3], 3: [0, 1, 2, 3]}
    with grpc.insecure_channel(first.address, CHANNEL_OPTIONS) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        answer = next(stub.Dispatch(iter([request(1)]), metadata=((FINGERPRINT_KEY, "f" * 16),)))
        assert answer.status.code == pb.CODE_OK
    handle = serve.get_deployment_handle(EXPERTS_DEPLOYMENT, APPLICATION)
    assert handle.expert_rows.remote().result(timeout_s=60)[1] == [0, 0, 1, 0, 0, 0]

    os.kill(first.pid, signal.SIGKILL)
    (second,) = until(directory, lambda found: len(found) == 1 and found[0].replica_id != first.replica_id)
    assert second.pid != first.pid

    asyncio.run(_drains_without_a_lost_answer(second, directory))


async def _drains_without_a_lost_answer(replica: directory_pb2.Replica, directory: str) -> None:
    """The application is deleted under load; the router of this test goes away when it hears of it."""
    from ray import serve

    tables = watch(directory)
    async with grpc.aio.insecure_channel(replica.address, CHANNEL_OPTIONS) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        call = stub.Dispatch(metadata=((FINGERPRINT_KEY, "f" * 16),))
        deleted = asyncio.create_task(asyncio.to_thread(serve.delete, APPLICATION))
        draining = asyncio.create_task(_draining(tables, replica.replica_id))
        answered = 0
        async with asyncio.timeout(PATIENCE_S):
            while not draining.done() or answered < 10:
                await call.write(request(answered))
                assert (await call.read()).status.code == pb.CODE_OK
                answered += 1
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        await deleted
    async with asyncio.timeout(PATIENCE_S):
        async for table in tables:
            if replica.replica_id not in {entry.replica_id for entry in table.replicas}:
                break


async def _draining(tables: AsyncIterator[directory_pb2.Table], replica_id: str) -> None:
    async for table in tables:
        states = {entry.replica_id: entry.state for entry in table.replicas}
        if states.get(replica_id) == pb.REPLICA_STATE_DRAINING:
            return


def test_watchers_and_replicas_outlive_a_killed_directory(artifact: Path, directory: str) -> None:
    import ray
    from ray import serve

    async def test() -> None:
        tables = watch(directory)
        async with asyncio.timeout(PATIENCE_S):
            async for before in tables:
                if len([entry for entry in before.replicas if entry.group == GROUP]) == 2:
                    break
            actors = ray.util.list_named_actors(all_namespaces=True)
            (name,) = [actor for actor in actors if f"{DIRECTORY_APPLICATION}#Directory#" in actor["name"]]
            ray.kill(ray.get_actor(name["name"], name["namespace"]), no_restart=False)
            async for after in tables:
                if after.directory_id != before.directory_id and not after.settling:
                    break
        assert {e.replica_id for e in before.replicas} == {e.replica_id for e in after.replicas}
        await tables.aclose()

    deploy(artifact, directory, replicas=2)
    asyncio.run(test())
    serve.delete(APPLICATION)
    until(directory, lambda found: not found)


def test_the_proxy_serves_many_watchers_and_frees_those_that_leave(directory: str) -> None:
    from ray import serve

    handle = serve.get_deployment_handle(DIRECTORY_DEPLOYMENT, DIRECTORY_APPLICATION)

    def until_open(count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while (found := handle.watchers.remote().result(timeout_s=60)) != count:
            assert time.monotonic() < deadline, f"{found} watches are open, not {count}"
            time.sleep(0.1)

    async def test() -> None:
        before = await asyncio.to_thread(handle.watchers.remote().result)
        watchers = [watch(directory) for _ in range(40)]
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(anext(tables) for tables in watchers))
        await asyncio.to_thread(until_open, before + 40)
        for tables in watchers:
            await tables.aclose()
        await asyncio.to_thread(until_open, before)

    asyncio.run(test())


def test_an_entry_of_no_use_is_refused_by_name_through_the_proxy(directory: str) -> None:
    with grpc.insecure_channel(directory) as channel:
        stub = directory_pb2_grpc.DirectoryServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            asked = directory_pb2.AnnounceRequest(replica=directory_pb2.Replica(replica_id="a"), lease_ms=500)
            stub.Announce(asked, metadata=(("application", DIRECTORY_APPLICATION),))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "announcement: group is empty" in refused.value.details()


def test_nothing_answers_at_the_directorys_route_over_http(directory: str, ray_cluster: Any) -> None:
    assert httpx.get(f"http://127.0.0.1:{ray_cluster.http_port}{DIRECTORY_ROUTE_PREFIX}", timeout=60).status_code == 404
