"""A replica in any process: weights, executor thread, gRPC server and its place in the directory."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from pathlib import Path

import torch

from expert_service.background import in_background
from expert_service.choice import build_executor
from expert_service.endpoint import Endpoint, Offer, make_endpoint
from expert_service.executor import Executor
from expert_service.metrics import EVERY_S, ReplicaMetrics
from expert_service.request import Served, max_rows
from expert_service.server import LoopThread
from expert_service.weights import hold_experts
from expertmesh.args import GroupArgs
from expertmesh.artifact.manifest import read_manifest
from expertmesh.directory.client import Announcer
from expertmesh.errors import ClusterError
from expertmesh.experts import resolve_experts
from expertmesh.v1 import directory_pb2
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.channel import PROTOCOL_VERSION
from expertmesh.wire.tensors import WIRE_DTYPES
from expertmesh.wire.tls import TlsFiles

QUIET_S = 0.5
"""A draining replica goes once no request came for this long."""
STOP_GRACE_S = 1.0


class Replica:
    """Serves from construction on; `drain` then `stop` end it.

    Raises ArtifactError and ConfigError where its experts cannot be loaded, ClusterError where it cannot listen.
    """

    def __init__(
        self,
        args: GroupArgs,
        directory: str | None,
        node_id: str = "",
        executor: Executor | None = None,
        directory_tls: TlsFiles | None = None,
    ) -> None:
        """Computes with `executor`; by default with the one that fits the device. `directory_tls`: where the directory
        asks for a certificate."""
        artifact = Path(args.artifact)
        manifest = read_manifest(artifact)
        wanted = resolve_experts(args.experts, manifest.layers, f"group {args.group}: experts")
        held = hold_experts(artifact, manifest, wanted)
        self._expert_bytes = held.total_bytes
        self._started_at = time.time()
        self._node_id = node_id
        self._state: pb.ReplicaState.ValueType = pb.REPLICA_STATE_READY
        rows = max_rows(manifest.hidden_size, manifest.top_k, args.max_queued_rows)
        self._offered = pb.DescribeResponse(
            replica_id=f"{args.group}-{uuid.uuid4().hex[:12]}",
            group=args.group,
            fingerprint=manifest.fingerprint,
            hidden_size=manifest.hidden_size,
            dtype=WIRE_DTYPES[manifest.torch_dtype],
            layers=[pb.LayerExperts(layer=layer, experts=sorted(held.layers[layer])) for layer in held.layers],
            limits=pb.Limits(max_rows=rows, max_queued_rows=args.max_queued_rows),
            protocol_version=PROTOCOL_VERSION,
        )
        masks = {layer: held.mask(layer) for layer in held.layers}
        served = Served(manifest.hidden_size, masks, rows, rows * manifest.top_k)
        offer = Offer(self._offered, served, args.max_queued_rows, args.num_threads, args.tls)
        executor = executor or in_background(
            lambda: build_executor(held, torch.device(args.device), args.num_threads, args.emulated)
        )
        self.endpoint: Endpoint = make_endpoint(offer, executor, args.transport)
        self._thread = LoopThread("expert-replica")
        self._announcer: Announcer | None = None
        try:
            self.endpoint.set_state(self._state)
            self.address = self.endpoint.listen(args.host, args.ports)
            if directory is not None:
                self._thread.run(self._announce(directory, args.lease_ms, directory_tls))
        except ClusterError:
            self.stop()
            raise

    async def _announce(self, directory: str, lease_ms: int, tls: TlsFiles | None) -> None:
        self._announcer = Announcer(directory, lease_ms, self.entry, self.layer_rows, tls)
        await self._announcer.start()
        self._publisher = asyncio.create_task(self._publish_forever())

    async def _publish_forever(self) -> None:
        metrics = ReplicaMetrics(self._offered.group, self.replica_id)
        while True:
            metrics.publish(self.load(), self.queue_wait())
            await asyncio.sleep(EVERY_S)

    @property
    def replica_id(self) -> str:
        return self._offered.replica_id

    def load(self) -> pb.Load:
        return self.endpoint.load()

    def expert_rows(self) -> dict[int, list[int]]:
        """MoE layer -> rows computed for each of its experts so far."""
        return self.endpoint.expert_rows()

    def queue_wait(self) -> tuple[int, int]:
        """Median and 95th percentile of how long requests waited in the last 5 to 6 s, microseconds; see `Endpoint`."""
        return self.endpoint.queue_wait()

    def layer_rows(self) -> list[directory_pb2.LayerRows]:
        """Rows computed so far for each of the experts that `entry` names."""
        rows = self.endpoint.expert_rows()
        return [
            directory_pb2.LayerRows(
                layer=held.layer, experts=held.experts, rows=[rows[held.layer][expert] for expert in held.experts]
            )
            for held in self._offered.layers
        ]

    def problem(self) -> str | None:
        """What has stopped working, or None."""
        if not self._thread.alive:
            return "the replica's thread has ended"
        if self._announcer is not None and not self._announcer.alive:
            return "the announcer has ended"
        return self.endpoint.problem()

    def entry(self) -> directory_pb2.Replica:
        """This replica's entry in the directory, as of now."""
        p50_us, p95_us = self.queue_wait()
        return directory_pb2.Replica(
            replica_id=self._offered.replica_id,
            group=self._offered.group,
            address=self.address,
            fingerprint=self._offered.fingerprint,
            layers=self._offered.layers,
            state=self._state,
            load=self.endpoint.load(),
            node_id=self._node_id,
            pid=os.getpid(),
            expert_bytes=self._expert_bytes,
            started_at=self._started_at,
            queue_wait=directory_pb2.QueueWait(p50_us=p50_us, p95_us=p95_us),
        )

    def drain(self, timeout_s: float) -> None:
        """Says that it is going, answers what it has and what still comes until all streams are closed or quiet, at
        most for `timeout_s`, and leaves the directory."""
        self._state = pb.REPLICA_STATE_DRAINING
        self.endpoint.set_state(self._state)
        if self._announcer is not None:
            self._thread.loop.call_soon_threadsafe(self._announcer.changed)
        draining_at = time.monotonic()
        deadline = draining_at + timeout_s
        while time.monotonic() < deadline and not self._quiet(draining_at):
            time.sleep(0.02)
        self._withdraw()

    def _quiet(self, draining_at: float) -> bool:
        streams = self.endpoint.streams()
        if streams.waiting:
            return False
        return not streams.count or time.monotonic() - max(draining_at, self.endpoint.last_request_at()) > QUIET_S

    def stop(self) -> None:
        """Ends it: what still waits is computed and answered, what still comes is refused. More calls do nothing."""
        if not self._thread.alive:
            return
        self.endpoint.close(STOP_GRACE_S)
        self._withdraw()
        self.endpoint.stop(STOP_GRACE_S)
        self._thread.stop()

    def _withdraw(self) -> None:
        if self._announcer is not None:
            self._thread.run(self._leave(self._announcer))

    async def _leave(self, announcer: Announcer) -> None:
        self._publisher.cancel()
        await announcer.stop()
