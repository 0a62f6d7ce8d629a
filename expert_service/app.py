"""A group of experts as a Ray Serve application: Serve places, watches and scales replicas, but carries no tokens."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from expert_service.background import in_background
from expertmesh.args import EXPERTS_DEPLOYMENT, GroupArgs
from expertmesh.config import ScalingSection
from expertmesh.scaling.samples import targets_as_stats

if TYPE_CHECKING:
    from expert_service.replica import Replica

DRAIN_S = 10.0


class ExpertReplica:
    def __init__(self, args: GroupArgs) -> None:
        os.environ["OMP_NUM_THREADS"] = str(args.num_threads)
        # imported here: Ray Serve builds the application in a process of its own, which need not load torch
        in_background(lambda: importlib.import_module("expert_service.replica"))
        import torch

        from expert_service.replica import Replica

        torch.set_num_threads(args.num_threads)
        if args.host == "auto":
            args = args.model_copy(update={"host": ray.util.get_node_ip_address()})
        node_id = ray.get_runtime_context().get_node_id()
        self._targets: dict[str, float] = {}
        self._replica: Replica | None = Replica(args, args.directory, node_id, directory_tls=args.tls)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls it at the start and on other targets. They reach the policy with the replica's load: Serve would
        restart all replicas of a group whose policy's own arguments change."""
        self._targets = targets_as_stats(ScalingSection.model_validate(user_config["scaling"]))

    async def check_health(self) -> None:
        """Raises RuntimeError once a part of the replica has stopped; a directory that is away is no such thing."""
        problem = self._replica.problem() if self._replica else None
        if problem:
            raise RuntimeError(problem)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The replica's load and its group's targets, which `expertmesh.scaling` reads. Serve asks once a second."""
        if self._replica is None:
            return {}
        load, (_, p95_us) = self._replica.load(), self._replica.queue_wait()
        return {
            "busy": load.busy,
            "queue_wait_ms": p95_us / 1000,
            "rows_per_s": load.rows_per_s,
            "queued_rows": float(load.queued_rows),
            **self._targets,
        }

    async def wake(self) -> None:
        """Does nothing: where no replica runs, Serve starts one to make the call."""

    async def expert_rows(self) -> dict[int, list[int]]:
        """MoE layer -> rows computed for each of its experts so far."""
        return self._replica.expert_rows() if self._replica else {}

    def __del__(self) -> None:
        """Serve calls it once when it stops the replica: drain, leave the directory, stop."""
        replica, self._replica = getattr(self, "_replica", None), None
        if replica is not None:
            replica.drain(DRAIN_S)
            replica.stop()


def build(args: dict[str, Any]) -> Any:
    """The application of one group; raises pydantic's ValidationError on bad arguments.

    Resources and replica bounds come from the `deployments:` override of the Serve config.
    """
    deployment = serve.deployment(
        name=EXPERTS_DEPLOYMENT,
        max_ongoing_requests=64,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=DRAIN_S + 5,
        health_check_period_s=2,
        health_check_timeout_s=30,
    )
    return deployment(ExpertReplica).bind(GroupArgs.model_validate(args))
