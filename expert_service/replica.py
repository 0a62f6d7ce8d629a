"""A replica in any process: weights, executor thread, gRPC server and its place in the directory."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from pathlib import Path

import torch

from expert_service.batcher import Batcher
from expert_service.grouped import build_executor
from expert_service.load import LoadMeter
from expert_service.request import Served, max_rows
from expert_service.runtime import Answer, Runtime
from expert_service.server import ExpertServer, LoopThread
from expert_service.service import ExpertServicer, Identity
from expert_service.weights import load_held_experts
from expertmesh.args import GroupArgs
from expertmesh.artifact.manifest import read_manifest
from expertmesh.directory.client import Announcer
from expertmesh.errors import ClusterError
from expertmesh.experts import parse_indices
from expertmesh.v1 import directory_pb2
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.channel import PROTOCOL_VERSION
from expertmesh.wire.tensors import WIRE_DTYPES

QUIET_S = 0.5
"""A draining replica goes once no request came for this long."""
STOP_GRACE_S = 1.0


class Replica:
    """Serves from construction on; `drain` then `stop` end it.

    Raises ArtifactError and ConfigError where its experts cannot be loaded, ClusterError where it cannot listen.
    """

    def __init__(self, args: GroupArgs, directory: str | None, node_id: str = "") -> None:
        artifact = Path(args.artifact)
        manifest = read_manifest(artifact)
        wanted = {
            layer: parse_indices(text, f"group {args.group}: layer {layer}") for layer, text in args.experts.items()
        }
        held = load_held_experts(artifact, manifest, wanted)
        self._identity = Identity(f"{args.group}-{uuid.uuid4().hex[:12]}", args.group, manifest.fingerprint)
        self._manifest = manifest
        self._layers = [pb.LayerExperts(layer=layer, experts=sorted(held.layers[layer])) for layer in held.layers]
        self._expert_bytes = held.total_bytes
        self._started_at = time.time()
        self._node_id = node_id
        self._state: pb.ReplicaState.ValueType = pb.REPLICA_STATE_READY
        rows = max_rows(manifest.hidden_size, manifest.top_k, args.max_queued_rows)
        self._limits = pb.Limits(max_rows=rows, max_queued_rows=args.max_queued_rows)
        self._batcher = Batcher(args.max_queued_rows, rows)
        self._meter = LoadMeter({layer: manifest.layers[layer] for layer in held.layers}, time.monotonic())
        executor = build_executor(held, torch.device(args.device))
        self._runtime = Runtime(self._batcher, executor, self._meter, self._deliver, args.num_threads)
        masks = {layer: held.mask(layer) for layer in held.layers}
        served = Served(manifest.hidden_size, masks, rows, rows * manifest.top_k)
        self._servicer = ExpertServicer(self._identity, served, self._batcher, self._describe, self._runtime.load)
        self._server = ExpertServer(self._servicer)
        self._announcer: Announcer | None = None
        self._thread = LoopThread("expert-server")
        self._runtime.start()
        try:
            self._thread.run(self._start(args, directory))
        except ClusterError:
            self.stop()
            raise

    async def _start(self, args: GroupArgs, directory: str | None) -> None:
        self.address = await self._server.start(args.host, args.ports)
        if directory is not None:
            self._announcer = Announcer(directory, args.lease_ms, self.entry)
            await self._announcer.start()

    @property
    def replica_id(self) -> str:
        return self._identity.replica_id

    def load(self) -> pb.Load:
        return self._runtime.load()

    def expert_rows(self) -> dict[int, list[int]]:
        """MoE layer -> rows computed for each of its experts so far."""
        return self._meter.expert_rows()

    def problem(self) -> str | None:
        """What has stopped working, or None."""
        if not self._thread.alive:
            return "the server's thread has ended"
        if not self._runtime.alive:
            return "the executor's thread has ended"
        if self._announcer is not None and not self._announcer.alive:
            return "the announcer has ended"
        return None

    def entry(self) -> directory_pb2.Replica:
        """This replica's entry in the directory, as of now."""
        return directory_pb2.Replica(
            replica_id=self._identity.replica_id,
            group=self._identity.group,
            address=self.address,
            fingerprint=self._identity.fingerprint,
            layers=self._layers,
            state=self._state,
            load=self._runtime.load(),
            node_id=self._node_id,
            pid=os.getpid(),
            expert_bytes=self._expert_bytes,
            started_at=self._started_at,
        )

    def drain(self, timeout_s: float) -> None:
        """Says that it is going, answers what it has and what still comes until all streams are closed or quiet, at
        most for `timeout_s`, and leaves the directory."""
        self._thread.run(self._drain(timeout_s))

    async def _drain(self, timeout_s: float) -> None:
        self._state = pb.REPLICA_STATE_DRAINING
        await self._server.set_serving(False)
        if self._announcer is not None:
            self._announcer.changed()
        draining_at = time.monotonic()
        deadline = draining_at + timeout_s
        while time.monotonic() < deadline and not self._quiet(draining_at):
            await asyncio.sleep(0.02)
        if self._announcer is not None:
            await self._announcer.stop()

    def _quiet(self, draining_at: float) -> bool:
        streams = self._servicer.streams
        if any(stream.waiting for stream in streams):
            return False
        return not streams or time.monotonic() - max(draining_at, self._servicer.last_request_at) > QUIET_S

    def stop(self) -> None:
        """Ends it: what still waits is computed and answered, what still comes is refused. More calls do nothing."""
        if not self._thread.alive:
            return
        self._batcher.close()
        self._runtime.join(STOP_GRACE_S)
        self._thread.run(self._stop())
        self._thread.stop()

    async def _stop(self) -> None:
        if self._announcer is not None:
            await self._announcer.stop()
        for stream in tuple(self._servicer.streams):
            stream.end()
        await self._server.stop(STOP_GRACE_S)

    def _deliver(self, answers: list[Answer]) -> None:
        self._thread.loop.call_soon_threadsafe(_answer_all, answers)

    def _describe(self) -> pb.DescribeResponse:
        return pb.DescribeResponse(
            replica_id=self._identity.replica_id,
            group=self._identity.group,
            fingerprint=self._identity.fingerprint,
            hidden_size=self._manifest.hidden_size,
            dtype=WIRE_DTYPES[self._manifest.torch_dtype],
            layers=self._layers,
            limits=self._limits,
            state=self._state,
            load=self._runtime.load(),
            protocol_version=PROTOCOL_VERSION,
        )


def _answer_all(answers: list[Answer]) -> None:
    for caller, response, rows in answers:
        caller.answer(response, rows)
