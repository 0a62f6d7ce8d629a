"""Other replica bounds for one group: the patch, the wait until it is applied, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field

from expertmesh.args import experts_application
from expertmesh.errors import ClusterError
from expertmesh.kubernetes.bounds import Bounds
from expertmesh.kubernetes.goal import Goal
from expertmesh.kubernetes.ray_services import Patched, RayServices
from expertmesh.kubernetes.serve_text import bounds_of, read_groups, set_bounds
from expertmesh.kubernetes.service import Service
from expertmesh.kubernetes.waiting import NotReached, Patience, Show, await_goal


@dataclass
class Scaling:
    """`name` is the RayService's."""

    services: RayServices
    name: str
    group: str
    bounds: Bounds
    patience: Patience = field(default_factory=Patience)
    show: Show = lambda _: None

    def patch(self, *, dry_run: bool = False) -> Patched:
        """Raises ConfigError where there is no such group."""
        return self.services.patch(self.name, lambda text: set_bounds(text, self.group, self.bounds), dry_run=dry_run)

    def wait(self, patched: Patched, *, roll_back: bool = True) -> None:
        """Until Ray Serve runs the group within the new bounds; goes back to the old ones where it does not.

        Raises ClusterError that says how it ended.
        """
        goal = Goal(patched.service.generation, running=frozenset({experts_application(self.group)}))
        try:
            await_goal(self.services, self.name, goal, self.patience, self.show, self._overtaken)
        except NotReached as failure:
            before = bounds_of(patched.before, self.group)
            if not roll_back:
                raise ClusterError(f"{failure}; the bounds stay {self.bounds}, they were {before}") from None
            done = self.roll_back(patched)
            raise ClusterError(f"{failure}; rolled back: the bounds are {done} again") from None

    def roll_back(self, patched: Patched) -> Bounds:
        """The whole text from before where nobody else has changed it since, otherwise this group's bounds alone."""
        before = bounds_of(patched.before, self.group)

        def back(text: str) -> str:
            return patched.before if text == patched.after else set_bounds(text, self.group, before)

        self.services.patch(self.name, back)
        return before

    def _overtaken(self, service: Service) -> str:
        now = read_groups(service.serve_config).get(self.group)
        if now == self.bounds:
            return ""
        what = f"the bounds {now}" if now else "no such group"
        return f"others have changed {service.where} meanwhile: group {self.group} has {what}; left as it is"
