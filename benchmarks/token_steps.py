"""Open-loop load on an expert tier: token steps through a router's real dispatcher. Used by `hot_experts`.

A token step sends a few rows through all MoE layers, one after another, as the decode step of an engine does. Steps
arrive by a Poisson process whatever the tier does, each on a thread of its own; a step's time counts from when it was
due.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy
import torch
from numpy.typing import NDArray

from expertmesh.artifact.manifest import Manifest
from expertmesh.errors import ExpertMeshError
from loadtest.config import Skew
from loadtest.skew import ExpertSampler
from router_service.dispatcher import Dispatcher

MAX_AT_ONCE = 128
SEED = 4


@dataclass(frozen=True)
class Profile:
    """What is asked. Times are seconds from the start."""

    duration_s: float
    rates: tuple[tuple[float, float], ...]
    """(when, token steps per second), straight lines in between; ascending in time."""
    rows: int
    """Of a token step."""
    before: Skew
    after: Skew
    drift_s: tuple[float, float]
    """When popularity begins to move from `before` to `after`, evenly, and when it is there."""

    def rate(self, at_s: float) -> float:
        times, rates = zip(*self.rates, strict=True)
        return float(numpy.interp(at_s, times, rates))

    def arrivals(self) -> list[float]:
        """When token steps are due; the same each time. A Poisson process by thinning (Lewis and Shedler 1979)."""
        generator = numpy.random.default_rng(SEED)
        most = max(rate for _, rate in self.rates)
        times, now = list[float](), 0.0
        while (now := now + float(generator.exponential(1 / most))) < self.duration_s:
            if generator.random() < self.rate(now) / most:
                times.append(now)
        return times

    def experts(self, manifest: Manifest, due_s: list[float]) -> list[list[NDArray[numpy.int32]]]:
        """[R, K] for each layer of each token step; the same each time."""
        begin, end = self.drift_s
        samplers = [ExpertSampler(skew, manifest.layers, manifest.top_k, SEED) for skew in (self.before, self.after)]
        generator = numpy.random.default_rng(SEED)
        found = []
        for number, at_s in enumerate(due_s):
            moved = generator.random((self.rows, 1)) < (at_s - begin) / (end - begin)
            layers = []
            for layer in manifest.layers:
                old, new = (one.draw(layer, at_s, self.rows, 1000 * number + layer) for one in samplers)
                layers.append(numpy.where(moved, new, old))
            found.append(layers)
        return found


@dataclass(frozen=True)
class TokenStep:
    due_s: float
    late_s: float
    """By how much it began later than it was due, on this side."""
    time_s: float
    """From when it was due until its last layer's sums were there."""


@dataclass
class Load:
    """One run of a profile. `steps` and `failures` grow while it runs."""

    dispatcher: Dispatcher
    manifest: Manifest
    profile: Profile
    steps: list[TokenStep] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    began: float = 0.0
    """Of the monotonic clock."""

    def __post_init__(self) -> None:
        profile = self.profile
        self._arrivals = profile.arrivals()
        self._chosen = profile.experts(self.manifest, self._arrivals)
        generator = torch.Generator().manual_seed(SEED)
        rows = torch.randn(profile.rows, self.manifest.hidden_size, generator=generator)
        self._hidden_states = rows.to(self.manifest.torch_dtype)
        self._weights = torch.full((profile.rows, self.manifest.top_k), 1 / self.manifest.top_k)

    def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Returns once every step has come back."""
        over = threading.Semaphore(0)
        with ThreadPoolExecutor(MAX_AT_ONCE) as pool:
            self.began = time.monotonic()
            started()
            for due_s, chosen in zip(self._arrivals, self._chosen, strict=True):
                time.sleep(max(0.0, self.began + due_s - time.monotonic()))
                pool.submit(self._step, due_s, chosen).add_done_callback(lambda _: over.release())
            for _ in self._arrivals:
                over.acquire()

    def _step(self, due_s: float, chosen: list[NDArray[numpy.int32]]) -> None:
        late_s = time.monotonic() - self.began - due_s
        try:
            for layer, experts in zip(self.manifest.layers, chosen, strict=True):
                started = self.dispatcher.start(layer, self._hidden_states, torch.from_numpy(experts), self._weights)
                self.dispatcher.finish(started)
        except ExpertMeshError as error:
            self.failures.append(str(error))
            return
        self.steps.append(TokenStep(due_s, late_s, time.monotonic() - self.began - due_s))
