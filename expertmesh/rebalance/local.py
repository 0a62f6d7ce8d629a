"""A rebalance of a cluster that the command line knows: its record, its config and its state directory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from expertmesh.artifact.manifest import Manifest, read_manifest
from expertmesh.cluster import record
from expertmesh.cluster.record import Deployed, Record
from expertmesh.config import ClusterConfig
from expertmesh.errors import ClusterError
from expertmesh.placement.plan import Plan, check_plan, plan_text
from expertmesh.rebalance.change import Change, difference
from expertmesh.rebalance.cluster import Cluster
from expertmesh.rebalance.journal import Journal, JournalFile, write_text
from expertmesh.rebalance.outlook import Outlook, look_ahead
from expertmesh.rebalance.run import Outcome, Patience, Rebalance, Show
from expertmesh.rebalance.serve_cluster import ServeCluster
from expertmesh.rebalance.steps import Step

BEFORE_FILE = "plan-before.json"


@dataclass(frozen=True)
class Proposal:
    """A checked plan as a change of what runs."""

    source: str
    change: Change
    replicas: dict[str, int]
    """What each group has now, or is expected to need."""
    steps: tuple[Step, ...]
    outlook: Outlook


@dataclass
class LocalCluster:
    """As it is now; whoever changes it holds the lock of its journals from before this is made.

    Raises ClusterError, ConfigError or ArtifactError where the cluster's config or model cannot be read.
    """

    running: Record
    show: Show = lambda _: None
    patience: Patience = field(default_factory=Patience)
    cluster: Cluster | None = None
    """Instead of Ray Serve's."""
    deployed: Deployed = field(init=False)
    manifest: Manifest = field(init=False)

    def __post_init__(self) -> None:
        self.deployed = record.load_deployed(self.running)
        self.manifest = read_manifest(self.config.model.artifact)
        self.folder = record.state_dir(self.running.name)
        self.journals = JournalFile(self.folder)
        cluster = self.cluster or ServeCluster(self.running, self.config, self.manifest)
        self.rebalance = Rebalance(
            cluster, self.config, self.manifest, self.journals, self.show, self.patience, self._remember
        )

    @property
    def config(self) -> ClusterConfig:
        return self.deployed.config

    def check_idle(self) -> None:
        """Raises ClusterError where a rebalance was left unfinished."""
        left = self.journals.read()
        if left is not None:
            raise ClusterError(
                f"a rebalance of {self.running.name} is unfinished ({left.done} of {len(left.steps)} steps are done): "
                "--resume goes on with it, --abort goes back"
            )

    def propose(self, plan: Plan, source: str, *, in_steps: bool = False) -> Proposal:
        """Raises ConfigError where the plan can't be served or has no room here."""
        check_plan(plan, self.config, self.manifest)
        change = difference(self.config.groups, plan.groups, self.manifest)
        states = self.rebalance.ask(self.rebalance.cluster.groups)
        running = {name: one.running for name, one in states.items()}
        needed = plan.predicted.group_replicas if plan.predicted else {}
        replicas = {change.renamed.get(name, name): count for name, count in needed.items()} | running
        steps = self.rebalance.steps_of(change, states, replicas, in_steps=in_steps)
        balancedness = plan.predicted.balancedness if plan.predicted else None
        outlook = look_ahead(change, steps, self.manifest, running, balancedness)
        return Proposal(source, change, replicas, steps, outlook)

    def apply(self, proposal: Proposal) -> Outcome:
        """Returns once all is over; raises ClusterError where it stays unfinished."""
        return self.rebalance.run(self.begin(proposal))

    def begin(self, proposal: Proposal) -> Journal:
        """Writes down what is going to happen, and how to get back."""
        before = Plan(fingerprint=self.manifest.fingerprint, groups=proposal.change.before)
        write_text(self.plan_before, plan_text(before))
        journal = Journal(
            plan=proposal.source,
            source_before=self.deployed.source,
            started_at=time.time(),
            before=proposal.change.before,
            after=proposal.change.after,
            replicas=proposal.replicas,
            steps=proposal.steps,
        )
        self.journals.write(journal)
        return journal

    def resume(self) -> Outcome:
        return self.rebalance.run(self._unfinished())

    def abort(self) -> Outcome:
        journal = self._unfinished()
        if journal.direction == "forward":
            journal = self.rebalance.back(journal, "aborted")
        return self.rebalance.run(journal)

    @property
    def plan_before(self) -> Path:
        """A plan of the groups that ran before the last rebalance."""
        return self.folder / BEFORE_FILE

    def _unfinished(self) -> Journal:
        journal = self.journals.read()
        if journal is None:
            raise ClusterError(f"no rebalance of {self.running.name} is unfinished")
        return journal

    def _remember(self, journal: Journal) -> None:
        source = journal.plan if journal.direction == "forward" else journal.source_before
        config = self.config.model_copy(update={"groups": journal.target})
        record.save_deployed(self.running.name, Deployed(source=source, config=config))
