"""The expert tier as a target, against real replicas over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from mesh import group_args, running_directory, running_groups

from expert_service.replica import Replica
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError, ConfigError
from expertmesh.wire.tls import TlsFiles
from loadtest.config import ExpertsTarget, RunConfig
from loadtest.expert_tier import ExpertTier, rows_asked
from loadtest.target import Clock, Outcome, Request

PATIENCE_S = 30.0


def run_config(directory: str, tls: TlsFiles | None = None, **load: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "target": {"kind": "experts", "directory": directory, "timeout_s": 20, "tls": tls},
            "stages": [{"name": "s", "duration_s": 1, "arrivals": {"kind": "constant", "rate": 10}}],
            "expert_load": load,
        }
    )


def requests(count: int, rows: int = 8) -> list[Request]:
    return [Request(index, 0, 1000 + index, index * 0.01, rows, 1) for index in range(count)]


def send(config: RunConfig, directory: str, what: list[Request]) -> list[Outcome]:
    """All at once."""

    async def run() -> list[Outcome]:
        assert isinstance(config.target, ExpertsTarget)
        tier = ExpertTier(config, directory, 0, config.target.tls)
        await tier.open()
        try:
            clock = Clock(time.monotonic())
            return await asyncio.gather(*(tier.prepare(request).run(clock) for request in what))
        finally:
            await tier.close()

    return asyncio.run(run())


def wait_for_replicas(directory: str, count: int, tls: TlsFiles | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(list_table(directory, tls=tls).replicas) != count:
        assert time.monotonic() < deadline, f"not {count} replicas in the directory"
        time.sleep(0.05)


def test_rows_arrive_where_the_skew_sends_them(demo_artifact: Path) -> None:
    skew = {"kind": "zipf", "permute_layers": True, "shifts": [{"at_s": 0.5, "by": 2}]}
    with running_directory() as directory, running_groups(demo_artifact, directory, 4) as replicas:
        wait_for_replicas(directory, 4)
        config = run_config(directory, skew=skew, top_k=3)
        outcomes = send(config, directory, requests(100))
        assert {outcome.status for outcome in outcomes} == {"ok"}
        assert {(outcome.prompt_tokens, outcome.output_tokens) for outcome in outcomes} == {(8, 8)}
        computed: Counter[tuple[int, int]] = Counter()
        for replica in replicas:
            for layer, experts in replica.expert_rows().items():
                computed.update({(layer, expert): rows for expert, rows in enumerate(experts)})
        asked = rows_asked(config, directory, requests(100))
        assert asked == dict(computed)
        assert sum(asked.values()) == 100 * 8 * 3


def test_layers_may_be_chosen(demo_artifact: Path) -> None:
    with running_directory() as directory, running_groups(demo_artifact, directory, 1) as (replica,):
        wait_for_replicas(directory, 1)
        send(run_config(directory, layers="1-2"), directory, requests(10))
        assert [sum(experts) > 0 for experts in replica.expert_rows().values()] == [False, True, True, False]


def test_a_large_dispatch_is_split(demo_artifact: Path) -> None:
    """More rows than the pool of random rows holds, and than a replica takes at once."""
    with running_directory() as directory:
        args = group_args(demo_artifact, directory, "all", set(range(16)), max_queued_rows=3000)
        replica = Replica(args, directory)
        try:
            wait_for_replicas(directory, 1)
            (outcome,) = send(run_config(directory), directory, requests(1, rows=2500))
            assert (outcome.status, outcome.output_tokens) == ("ok", 2500)
        finally:
            replica.stop()


def test_rows_go_to_both_replicas_of_an_expert(demo_artifact: Path) -> None:
    with running_directory() as directory:
        args = group_args(demo_artifact, directory, "all", set(range(16)))
        replicas = [Replica(args, directory), Replica(args, directory)]
        try:
            wait_for_replicas(directory, 2)
            outcomes = send(run_config(directory), directory, requests(100))
            assert {outcome.status for outcome in outcomes} == {"ok"}
            assert all(replica.load().rows_total > 0.2 * 800 for replica in replicas)
        finally:
            for replica in replicas:
                replica.stop()


def test_a_full_queue_is_told_as_rejected(demo_artifact: Path) -> None:
    with running_directory() as directory:
        args = group_args(demo_artifact, directory, "all", set(range(16)), max_queued_rows=16)
        replica = Replica(args, directory)
        try:
            wait_for_replicas(directory, 1)
            outcomes = send(run_config(directory), directory, requests(200, rows=16))
            found = Counter(outcome.status for outcome in outcomes)
            assert set(found) == {"ok", "rejected"}, found
            assert any("RESOURCE_EXHAUSTED" in outcome.error for outcome in outcomes)
        finally:
            replica.stop()


def test_a_replica_that_goes_and_comes_back(demo_artifact: Path) -> None:
    """Dispatches meanwhile fail by class, none is lost; those to its successor are answered."""

    async def run(directory: str, first: Replica) -> None:
        tier = ExpertTier(run_config(directory), directory, 0)
        await tier.open()
        clock = Clock(time.monotonic())
        try:
            assert (await tier.prepare(requests(1)[0]).run(clock)).status == "ok"
            await asyncio.to_thread(first.stop)
            gone = await tier.prepare(requests(1)[0]).run(clock)
            assert gone.status in ("refused", "disconnected") and gone.error
            args = group_args(demo_artifact, directory, "all", set(range(16)))
            second = await asyncio.to_thread(Replica, args, directory)
            try:
                while (await tier.prepare(requests(1)[0]).run(clock)).status != "ok":
                    assert clock.now() < PATIENCE_S
                    await asyncio.sleep(0.05)
            finally:
                await asyncio.to_thread(second.stop)
        finally:
            await tier.close()

    with running_directory() as directory:
        first = Replica(group_args(demo_artifact, directory, "all", set(range(16))), directory)
        wait_for_replicas(directory, 1)
        asyncio.run(run(directory, first))


def test_mutual_tls(demo_artifact: Path, tmp_path: Path) -> None:
    """With the files of the replicas' authority it gets answers, without them one line."""
    authority = Authority(tmp_path)
    tls = authority.issue()
    with running_directory(tls) as directory:
        args = group_args(demo_artifact, directory, "all", set(range(16)), tls=tls)
        replica = Replica(args, directory, directory_tls=tls)
        try:
            wait_for_replicas(directory, 1, tls)
            (outcome,) = send(run_config(directory, authority.issue()), directory, requests(1))
            assert outcome.status == "ok", outcome.error
            with pytest.raises(ClusterError, match=r"directory at .* does not answer: UNAVAILABLE"):
                send(run_config(directory), directory, requests(1))
            (tmp_path / "authority" / "ca.pem").write_text("nonsense")
            with pytest.raises(ConfigError, match="is not PEM"):
                send(run_config(directory, args.tls), directory, requests(1))
        finally:
            replica.stop()


def test_what_cannot_be_run_is_refused_before_anything_is_sent(demo_artifact: Path) -> None:
    with running_directory() as directory:
        with pytest.raises(ClusterError, match="it lists no replica"):
            send(run_config(directory), directory, [])
        half = Replica(group_args(demo_artifact, directory, "half", {0, 1, 2, 5}), directory)
        try:
            wait_for_replicas(directory, 1)
            with pytest.raises(ClusterError, match="layer 0: no replica holds expert 3-4"):
                send(run_config(directory), directory, [])
            with pytest.raises(ConfigError, match=r"layers: 7 not served \(MoE layers: 0-3\)"):
                send(run_config(directory, layers="3,7"), directory, [])
        finally:
            half.stop()
    with pytest.raises(ClusterError, match="does not answer"):
        send(run_config(directory), directory, [])
