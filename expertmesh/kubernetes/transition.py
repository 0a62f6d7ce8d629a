"""From the group applications that a Serve config has to others, in two edits: pure functions.

First new groups are added beside the old ones; once all of them run, the old ones go. Each edit is one of the text that
is there by then, so that what others change meanwhile stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.args import experts_application
from expertmesh.artifact.manifest import Manifest
from expertmesh.config import GroupSection
from expertmesh.errors import ConfigError
from expertmesh.kubernetes.bounds import USER_CONFIG, Bounds, read_bounds, with_bounds
from expertmesh.kubernetes.groups import check_covers, filled, known_model, make_application, read_group
from expertmesh.kubernetes.serve_text import (
    WHAT,
    Application,
    Applications,
    experts_override,
    group_applications,
    read_applications,
    with_override,
    write_applications,
)
from expertmesh.placement.plan import Plan
from expertmesh.rebalance.change import Change, difference


@dataclass(frozen=True)
class Transition:
    text_before: str
    before: Applications
    """The groups' applications, by name."""
    after: Applications

    @property
    def added(self) -> frozenset[str]:
        return frozenset(self.after.keys() - self.before.keys())

    @property
    def removed(self) -> frozenset[str]:
        return frozenset(self.before.keys() - self.after.keys())

    @property
    def resized(self) -> frozenset[str]:
        """Those that run on, with other bounds or targets."""
        return frozenset(name for name, one in self.after.items() if one != self.before.get(name, one))

    @property
    def wanted(self) -> str:
        """The text that it ends with where nobody else changes anything."""
        return self.shrink(self.grow(self.text_before))

    def grow(self, text: str) -> str:
        """With what is to come; a group that may sleep is awake until it has been seen to run."""
        now = read_applications(text)
        missing = {name: _awake(one) for name, one in self.after.items() if name in self.added and name not in now}
        return write_applications(text, {**now, **missing})

    def ungrow(self, text: str) -> str:
        """The text from before where only `grow` has changed it."""
        if text == self.grow(self.text_before):
            return self.text_before
        now = read_applications(text)
        return write_applications(text, {name: one for name, one in now.items() if name not in self.added})

    def shrink(self, text: str) -> str:
        """Without what is to go, and with the bounds and targets that are wanted at last.

        Raises ConfigError where others have removed a group that is to stay.
        """
        left = {name: one for name, one in read_applications(text).items() if name not in self.removed}
        for name in self.after:
            if name not in left:
                raise ConfigError(f"others have removed application {name} meanwhile")
            if name in self.added | self.resized:
                left[name] = with_override(left[name], experts_override(self.after[name]))
        return write_applications(text, left)


@dataclass(frozen=True)
class Proposal:
    change: Change
    transition: Transition


def propose(text: str, plan: Plan, manifest: Manifest | None = None) -> Proposal:
    """A plan as a transition of what `text` deploys. `manifest` is the model's, where it is at hand.

    Raises ConfigError where the plan is of another model, leaves out an expert that is served now, or names one that is
    not.
    """
    if manifest is not None and plan.fingerprint != manifest.fingerprint:
        raise ConfigError(f"plan: made for model {plan.fingerprint[:12]}, the artifact is {manifest.fingerprint[:12]}")
    found = group_applications(text)
    if not found:
        raise ConfigError(f"{WHAT}: deploys no groups of experts")
    running = {name: read_group(one) for name, one in found.items()}
    model = manifest or known_model(running.values())
    groups = filled(plan.groups, list(running.values()))
    check_covers(groups, model)
    change = difference(list(running.values()), groups, model)
    after = {}
    for group in change.after:
        if group.name not in running:
            made = make_application(group, _alike(group, found, running))
        elif group.name in change.resized:
            made = _resized(group, running[group.name], found[group.name])
        else:
            made = found[group.name]
        after[experts_application(group.name)] = made
    return Proposal(change, Transition(text, {one["name"]: one for one in found.values()}, after))


def running_plan(text: str, fingerprint: str) -> Plan:
    """The groups that `text` deploys, as a plan that leads back to them."""
    return Plan(fingerprint=fingerprint, groups=tuple(map(read_group, group_applications(text).values())))


def _resized(group: GroupSection, running: GroupSection, application: Application) -> Application:
    override = with_bounds(experts_override(application), Bounds(group.min_replicas, group.max_replicas))
    if group.scaling != running.scaling:
        override |= {USER_CONFIG: experts_override(make_application(group, application))[USER_CONFIG]}
    return with_override(application, override)


def _alike(group: GroupSection, found: Applications, running: dict[str, GroupSection]) -> Application:
    """One that runs in the same pool, where there is one."""
    same = [name for name, one in running.items() if one.resources == group.resources]
    return found[(same or list(found))[0]]


def _awake(application: Application) -> Application:
    override = experts_override(application)
    bounds = read_bounds(override)
    return with_override(application, with_bounds(override, Bounds(max(1, bounds.least), bounds.most)))
