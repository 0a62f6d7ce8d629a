"""The controller's view of a RayService: observed loads from the directory, changes through the API server."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import ClusterConfig, ModelSection, ScalingSection
from expertmesh.directory.client import expert_load
from expertmesh.kubernetes.groups import read_group
from expertmesh.kubernetes.lease import Candidate, Leadership, run_as_leader
from expertmesh.kubernetes.ray_services import RayServices
from expertmesh.kubernetes.rebalance import Rebalance
from expertmesh.kubernetes.serve_text import group_applications
from expertmesh.kubernetes.transition import Proposal, propose
from expertmesh.kubernetes.waiting import Patience, Show
from expertmesh.placement.plan import Plan
from expertmesh.rebalance.decision import Attempt
from expertmesh.rebalance.planning import plan_for
from expertmesh.rebalance.watch import Controller, Planned, Report
from expertmesh.v1 import directory_pb2
from expertmesh.wire.tls import TlsFiles

BEAT_S = 10.0
"""Between two beats of a process that waits for its next look."""
LOST = "this process leads no more"


@dataclass(frozen=True)
class ControlledService:
    """A Subject, of the RayService called `name` whose directory is at host:port `directory`."""

    services: RayServices
    name: str
    directory: str
    artifact: Path
    manifest: Manifest
    patience: Patience
    show: Show
    memory_gib: float | None = None
    """Of experts in one replica, which a Serve config does not tell."""
    tls: TlsFiles | None = None
    """Where the directory asks for a certificate."""
    stopped: Callable[[], str] = lambda: ""
    """As a Rebalance takes it."""

    def loads(self, window_s: float) -> directory_pb2.ExpertLoadReply:
        return expert_load(self.directory, window_s, tls=self.tls)

    def planned(self, loads: directory_pb2.ExpertLoadReply) -> Planned:
        text = self.services.get(self.name).serve_config
        return plan_for(loads, read_config(text, self.artifact, self.memory_gib), self.manifest)

    def groups_changed(self, plan: Plan) -> int:
        change = self._proposal(plan).change
        return len(change.added) + len(change.removed)

    def last(self) -> Attempt | None:
        """None: what others did is not written down on Kubernetes."""
        return None

    def apply(self, plan: Plan) -> bool:
        """Raises ClusterError where it was rolled back, too."""
        transition = self._proposal(plan).transition
        Rebalance(self.services, self.name, transition, self.patience, self.show, self.stopped).run()
        return True

    def _proposal(self, plan: Plan) -> Proposal:
        return propose(self.services.get(self.name).serve_config, plan, self.manifest)


def read_config(text: str, artifact: Path, memory_gib: float | None) -> ClusterConfig:
    """The cluster that a Serve config deploys, with `memory_gib` of experts for one replica of any group. Raises
    ConfigError where it is none."""
    running = map(read_group, group_applications(text).values())
    groups = tuple(one.model_copy(update={"memory_gib": memory_gib}) for one in running)
    scaling = next((group.scaling for group in groups if group.scaling), ScalingSection())
    return ClusterConfig(model=ModelSection(artifact=artifact), groups=groups, scaling=scaling)


def lead(
    service: ControlledService,
    controller: Controller,
    candidate: Candidate | None,
    interval_s: float,
    tell: Callable[[Report], None],
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Looks for as long as this process leads, and waits to lead again when it no longer does; for ever.

    Once it has lost the lead it writes nothing more, in the middle of a rebalance either: the next leader finds the
    groups that are there and plans from them. `beat` is called whenever it gets on, at least every BEAT_S or so.
    """

    def show(text: str) -> None:
        beat()
        service.show(text)

    def work(leadership: Leadership) -> None:
        def pause(seconds: float) -> None:
            until = time.monotonic() + seconds
            while (left := until - time.monotonic()) > 0 and not leadership.wait(min(left, BEAT_S)):
                beat()

        subject = replace(service, show=show, stopped=lambda: LOST if leadership.lost else "")
        for report in controller.reports(lambda: subject, interval_s, pause):
            beat()
            tell(report)
            if leadership.lost:
                return

    if candidate is None:
        work(Leadership())
    else:
        run_as_leader(candidate, work, service.show, beat)


def identity() -> str:
    """Of this process among the candidates: in a pod its host's name is the pod's."""
    return socket.gethostname()
