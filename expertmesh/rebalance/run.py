"""Does the steps of a rebalance one after another, writes down each, and goes back where one fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from expertmesh.artifact.manifest import Manifest
from expertmesh.config import ClusterConfig, GroupSection
from expertmesh.errors import ClusterError, ConfigError
from expertmesh.experts import LayerExperts
from expertmesh.rebalance.change import Change, between, held_experts
from expertmesh.rebalance.cluster import Cluster, GroupState
from expertmesh.rebalance.journal import Journal, JournalFile
from expertmesh.rebalance.steps import Step, make_steps
from expertmesh.resources import check_room
from expertmesh.retry import retry
from expertmesh.v1 import directory_pb2
from expertmesh.v1 import expert_pb2 as pb

T = TypeVar("T")
Outcome = Literal["done", "rolled back"]


@dataclass(frozen=True)
class Progress:
    """One line of what is going on."""

    number: int
    total: int
    step: str
    detail: str
    back: bool = False

    @property
    def text(self) -> str:
        return f"{'roll-back ' * self.back}{self.number}/{self.total}  {self.step}: {self.detail}"


Show = Callable[[Progress], None]


@dataclass(frozen=True)
class Patience:
    """Seconds."""

    start_s: float = 600
    """Until a new group must be ready."""
    use_s: float = 20
    """For rows to reach the new groups; without traffic none will."""
    leave_s: float = 120
    """Until an old group must be gone."""
    answer_s: float = 30
    """The cluster may be silent for so long before a step fails."""
    poll_s: float = 0.5
    """Between two looks at the directory."""
    look_s: float = 5
    """Between two looks at all of the cluster, which takes Ray Serve a quarter of a second of CPU time."""


class StepFailed(ClusterError):
    """A new group does not do what it should; the old ones are untouched, so going back is safe."""


@dataclass
class Rebalance:
    """`config` is what runs. Whoever calls `run` holds the lock of `journals`."""

    cluster: Cluster
    config: ClusterConfig
    manifest: Manifest
    journals: JournalFile
    show: Show = lambda _: None
    patience: Patience = Patience()
    at_end: Callable[[Journal], None] = field(default=lambda _: None)
    """Is told when all steps are done, before the journal is closed; perhaps more than once."""
    before_step: Callable[[Journal, Step], None] = field(default=lambda *_: None)
    """Is told of each step that begins."""

    def steps_of(
        self, change: Change, states: Mapping[str, GroupState], replicas: Mapping[str, int], *, in_steps: bool = False
    ) -> tuple[Step, ...]:
        """`states` are the cluster's groups, `replicas` how many a new group should begin with.

        Raises ConfigError where the cluster has no room for any order of the steps, and ClusterError where it runs
        other groups than its config says.
        """
        present, expected = {name for name, one in states.items() if not one.leaving}, {g.name for g in change.before}
        if present != expected:
            others = ", ".join(sorted(present ^ expected))
            raise ClusterError(
                f"the cluster's groups are not those that it was given last ({others}); apply its config with `up`"
            )
        held = held_experts((*change.before, *change.after), self.manifest)
        return make_steps(change, held, self._fits(states), replicas, in_steps=in_steps)

    def run(self, journal: Journal) -> Outcome:
        """Does what is left of the journal's steps and closes it. Where a new group fails, goes back by itself.

        Raises ClusterError where neither way can be finished; the journal then stays for `resume` or `abort`.
        """
        try:
            journal = self._run(journal)
        except StepFailed as failed:
            if journal.direction == "back":
                raise
            current = self.journals.read() or journal
            journal = self._run(self.back(current, str(failed), distrusted=_failed_groups(current)))
        self.at_end(journal)
        self.journals.close(journal.model_copy(update={"ended_at": time.time()}))
        return "done" if journal.direction == "forward" else "rolled back"

    def back(self, journal: Journal, reason: str, distrusted: Iterable[str] = ()) -> Journal:
        """The journal of the way back, written down: what is missing of the groups before comes first."""
        states = self.ask(self.cluster.groups)
        known = {group.name: group for group in (*journal.after, *journal.before)}
        if strangers := sorted(name for name, one in states.items() if name not in known and not one.leaving):
            raise ClusterError(f"the cluster runs groups of neither side: {', '.join(strangers)}; use `up`")
        failed = {*journal.distrusted, *distrusted}
        deployed = [group for name, group in known.items() if name in states and not states[name].leaving]
        present = tuple(group for group in deployed if group.name not in failed)
        change = between(present, journal.before)
        steps = make_steps(change, held_experts(known.values(), self.manifest), self._fits(states), journal.replicas)
        # nothing was removed yet that only a failed group holds
        first = Step(kind="remove", names=tuple(g.name for g in deployed if g.name in failed), groups=present)
        settle = Step(kind="settle", names=tuple(g.name for g in journal.before), groups=journal.before)
        back = journal.model_copy(
            update={
                "direction": "back",
                "steps": (*([first] * bool(first.names)), *(one for one in steps if one.kind != "settle"), settle),
                "done": 0,
                "reason": reason,
                "distrusted": tuple(failed),
            }
        )
        self.journals.write(back)
        return back

    def _run(self, journal: Journal) -> Journal:
        for number in range(journal.done, len(journal.steps)):
            step = journal.steps[number]

            def say(detail: str, number: int = number, step: Step = step, journal: Journal = journal) -> None:
                back = journal.direction == "back"
                self.show(Progress(number + 1, len(journal.steps), step.text, detail, back))

            self.before_step(journal, step)
            self._do(step, journal, say)
            journal = journal.model_copy(update={"done": number + 1})
            self.journals.write(journal)
        return journal

    def _do(self, step: Step, journal: Journal, say: Callable[[str], None]) -> None:
        if step.kind in ("start", "remove", "settle"):
            self.ask(lambda: self.cluster.apply(step.groups))
        if step.kind == "start":
            self._await_ready(step.names, say)
        if step.kind in ("verify", "use"):
            self._await_listed(step.names)
        if step.kind == "verify":
            self._verify(step.names, journal, say)
        elif step.kind == "use":
            self._await_rows(step.names, journal, say)
        elif step.kind == "remove":
            self._await_gone(step.names, say)
        say("done")

    def _await_ready(self, names: Sequence[str], say: Callable[[str], None]) -> None:
        """Looks at the directory, which costs little, and at the cluster as soon as the groups stand there, and now and
        then in between."""
        deadline = time.monotonic() + self.patience.start_s
        look_at = time.monotonic() + self.patience.look_s
        while True:
            if set(names) <= {one.group for one in _ready(self.ask(self.cluster.table))}:
                look_at = min(look_at, time.monotonic())
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + self.patience.look_s
                if self._all_ready(names, say):
                    return
            if time.monotonic() > deadline:
                states = self.ask(self.cluster.groups)
                details = "; ".join(f"{name}: {states[name].detail if name in states else 'absent'}" for name in names)
                raise StepFailed(f"not ready after {self.patience.start_s:.0f} s: {details}")
            time.sleep(self.patience.poll_s)

    def _await_listed(self, names: Sequence[str]) -> None:
        """Ready once already, but perhaps just restarted."""
        deadline = time.monotonic() + self.patience.start_s
        while missing := set(names) - {one.group for one in _ready(self.ask(self.cluster.table))}:
            if time.monotonic() > deadline:
                raise StepFailed(f"group {min(missing)} has left the directory")
            time.sleep(self.patience.poll_s)

    def _all_ready(self, names: Sequence[str], say: Callable[[str], None]) -> bool:
        """Raises StepFailed where one has failed."""
        states = self.ask(self.cluster.groups)
        waiting = {name: states.get(name) for name in names if name not in states or not states[name].ready}
        for name, state in waiting.items():
            if state is not None and state.error:
                raise StepFailed(f"group {name} does not start: {state.error}")
        if waiting:
            say("; ".join(f"{name}: {one.detail if one else 'absent'}" for name, one in waiting.items()))
        return not waiting

    def _verify(self, names: Sequence[str], journal: Journal, say: Callable[[str], None]) -> None:
        # imported here: it loads numpy, which the command line does without
        from expertmesh.rebalance.probe import Unverified, Unwitnessed, verify

        table = self.ask(self.cluster.table)
        held = held_experts((*journal.before, *journal.after), self.manifest)
        for name in names:
            others = [one for one in _ready(table) if one.group not in (name, *journal.distrusted)]
            own = [one for one in _ready(table) if one.group == name]
            if not own:
                raise StepFailed(f"group {name} has left the directory")
            for new in own:
                try:
                    found = verify(new, others, held[name], self.manifest.fingerprint, self.config.security.tls)
                except Unverified as error:
                    raise StepFailed(f"group {name} is not what it should be: {error}") from None
                except Unwitnessed as error:
                    raise StepFailed(f"group {name} cannot be compared: {error}") from None
                say(
                    f"{new.address} answers as others do for {found.compared} experts of all layers "
                    f"(largest difference {found.worst:.1g} of a row's RMS)"
                    + (f"; {found.alone} have no other replica" if found.alone else "")
                    + "".join(f"; failed beside it: {one}" for one in found.failed)
                )

    def _await_rows(self, names: Sequence[str], journal: Journal, say: Callable[[str], None]) -> None:
        """Until routers send rows to every one of the groups; after `use_s` also where there is no traffic."""
        from expertmesh.rebalance.probe import rows_total

        addresses = [one.address for one in _ready(self.ask(self.cluster.table))]
        counted = rows_total(addresses, self.config.security.tls)
        held = held_experts((*journal.before, *journal.after), self.manifest)
        deadline = time.monotonic() + self.patience.use_s
        while True:
            replicas = [one for one in _ready(self.ask(self.cluster.table)) if one.address in counted]
            rows = dict.fromkeys([*names, *(one.group for one in replicas)], 0)
            for one in replicas:
                rows[one.group] += max(0, one.load.rows_total - counted[one.address])
            say(", ".join(f"{name} {rows[name]} rows" for name in names))
            if all(rows[name] for name in names):
                return
            if time.monotonic() > deadline:
                break
            time.sleep(self.patience.poll_s)
        others = [name for name, count in rows.items() if count and name not in names]
        passed_by = [name for name in others if name in held and _within(held[name], names, held)]
        if passed_by and not any(rows[name] for name in names):
            where = ", ".join(one.address for one in replicas if one.group in names)
            none = ", ".join(names)
            raise StepFailed(f"routers send rows to {passed_by[0]} and none to {none}: do they reach {where}?")

    def _await_gone(self, names: Sequence[str], say: Callable[[str], None]) -> None:
        deadline = time.monotonic() + self.patience.leave_s
        while True:
            listed = {one.group for one in self.ask(self.cluster.table).replicas}
            left = {name: "draining" for name in names if name in listed}
            if not left:
                states = self.ask(self.cluster.groups)
                left = {name: states[name].detail for name in names if name in states}
            if not left:
                return
            details = "; ".join(f"{name}: {detail}" for name, detail in left.items())
            if time.monotonic() > deadline:
                raise ClusterError(f"not gone after {self.patience.leave_s:.0f} s: {details}")
            say(details)
            time.sleep(self.patience.poll_s)

    def ask(self, call: Callable[[], T]) -> T:
        """Tries again for a while where the cluster does not answer."""
        return retry(call, ClusterError, self.patience.answer_s, self.patience.poll_s)

    def _fits(self, states: Mapping[str, GroupState]) -> Callable[[Sequence[GroupSection]], str]:
        nodes = self.ask(self.cluster.nodes)
        running = {name: one.running for name, one in states.items()}

        def fits(groups: Sequence[GroupSection]) -> str:
            if nodes is None:
                return ""
            as_now = [
                one.model_copy(update={"min_replicas": max(one.min_replicas, running.get(one.name, 0))})
                for one in groups
            ]
            try:
                check_room(self.config.model_copy(update={"groups": tuple(as_now)}), nodes)
            except ConfigError as error:
                return str(error)
            return ""

        return fits


def _ready(table: directory_pb2.Table) -> list[directory_pb2.Replica]:
    return [one for one in table.replicas if one.state == pb.REPLICA_STATE_READY]


def _within(held: LayerExperts, names: Iterable[str], all_held: dict[str, LayerExperts]) -> bool:
    """Whether every expert of `held` is in one of the groups, so that rows for it could go there."""
    return all(
        experts <= frozenset().union(*(all_held[name].get(layer, frozenset()) for name in names))
        for layer, experts in held.items()
    )


def _failed_groups(journal: Journal) -> tuple[str, ...]:
    """The groups of the step that was under way."""
    return journal.steps[journal.done].names if journal.done < len(journal.steps) else ()
