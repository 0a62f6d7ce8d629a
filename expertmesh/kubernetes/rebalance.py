"""A plan's groups on a running RayService: new ones beside the old, and once they run, the old ones go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from expertmesh.errors import ClusterError
from expertmesh.kubernetes.goal import Goal
from expertmesh.kubernetes.ray_services import Patched, RayServices
from expertmesh.kubernetes.serve_text import read_applications
from expertmesh.kubernetes.service import Service
from expertmesh.kubernetes.transition import Transition
from expertmesh.kubernetes.waiting import NotReached, Patience, Show, await_goal

ROLL_BACK_S = 60.0
"""For so long a roll-back is tried where the API server does not answer."""


class Stopped(ClusterError):
    """This process may write nothing more."""


@dataclass
class Rebalance:
    """`name` is the RayService's. `stopped` says in a line why nothing more may be written, such as a lead that was
    lost: then what is half done stays, for whoever may go on. Empty: go on."""

    services: RayServices
    name: str
    transition: Transition
    patience: Patience = field(default_factory=Patience)
    show: Show = lambda _: None
    stopped: Callable[[], str] = lambda: ""

    def check(self) -> Patched:
        """The API server's view of the first patch, which it does not keep."""
        return self.services.patch(self.name, self.transition.grow, dry_run=True)

    def run(self, *, roll_back: bool = True) -> None:
        """Returns once only the plan's groups are there.

        The old groups serve while the new ones come up: where one does not come, or where this is interrupted, what was
        added is removed again. Once old ones have been told to go, nothing is taken back. Raises ClusterError that says
        how it ended, and Stopped where it was stopped.
        """
        self._await_leaving()
        try:
            patched = self._patch(self.transition.grow)
            self._await("new groups", Goal(patched.service.generation, running=self.transition.added))
        except (NotReached, KeyboardInterrupt) as failure:
            if not roll_back or self.stopped():
                raise
            self._back()
            if isinstance(failure, KeyboardInterrupt):
                self.show("interrupted; rolled back: the groups are those from before")
                raise
            raise ClusterError(f"{failure}; rolled back: the groups are those from before") from None
        patched = self._patch(self.transition.shrink)
        running = self.transition.added | self.transition.resized
        try:
            self._await("old groups", Goal(patched.service.generation, running, gone=self.transition.removed))
        except NotReached as failure:
            raise ClusterError(f"the new groups run and stay, but: {failure}") from None

    def _await_leaving(self) -> None:
        """Ray Serve 2.60 would forget that an application is wanted again which it is just deleting."""
        found = self.services.get(self.name)
        absent = self.transition.added - read_applications(found.serve_config).keys()
        leaving = frozenset(name for name in absent if found.application(name))
        if leaving:
            goal = Goal(found.generation, gone=leaving)
            self._follow("leaving", goal)

    def _await(self, what: str, goal: Goal) -> None:
        def overtaken(service: Service) -> str:
            now = read_applications(service.serve_config).keys()
            others = [f"{name} is gone" for name in goal.running - now] + [
                f"{name} is back" for name in goal.gone & now
            ]
            if not others:
                return ""
            return f"others have changed {service.where} meanwhile: {min(others)}; left as it is"

        self._follow(what, goal, overtaken)

    def _follow(self, what: str, goal: Goal, overtaken: Callable[[Service], str] = lambda _: "") -> None:
        def others(service: Service) -> str:
            self._check_stopped()
            return overtaken(service)

        await_goal(self.services, self.name, goal, self.patience, lambda text: self.show(f"{what}: {text}"), others)

    def _patch(self, edit: Callable[[str], str]) -> Patched:
        def if_allowed(text: str) -> str:
            self._check_stopped()
            return edit(text)

        return self.services.patch(self.name, if_allowed)

    def _check_stopped(self) -> None:
        if why := self.stopped():
            raise Stopped(f"RayService {self.services.namespace}/{self.name}: {why}; left as it is")

    def _back(self) -> None:
        deadline = time.monotonic() + ROLL_BACK_S
        while True:
            try:
                self._patch(self.transition.ungrow)
                return
            except Stopped:
                raise
            except ClusterError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(1)
