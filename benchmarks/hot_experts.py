"""Hot experts scale on their own, against scaling all experts together: real Ray Serve, gRPC and routing, emulated
devices.

The demo model's experts live in 8 groups of 2; token steps come open-loop, their experts drawn by Zipf 1.0 with the
same ranking in every layer, so that one group gets 44 % of the pairs. Each run begins with as many replicas as its way
of scaling holds for the first load. After STEP_S seconds the load rises by half at once; then popularity moves to other
experts within DRIFT_S, so that another group becomes the hot one. Both runs see the same steps and the same policy,
targets and bounds; in the baseline all groups get as many replicas as the one that needs most (`uniform`). A replica
counts for as long as it holds its device: while it starts, runs and stops; all groups hold equally many experts.

`slo_attainment` is the share of windows of WINDOW_S whose 95th percentile of the time per output token keeps SLO_MS;
`reaction_s` goes from the load's step to the first row on a new replica of the hot group, less `replica_start_s`, from
the decision until that replica could be sent rows. Every figure is of emulated devices. On few cores the baseline pays
for its many starts with time that a real cluster's nodes would have (see `starts`): `slo_attainment_at_rest` leaves out
the windows in which a run's replicas started.
"""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy

from benchmarks.emulated_tier import Tier, running_tier, say
from benchmarks.measure import percentile
from benchmarks.scaling_switch import Switch
from benchmarks.token_steps import Load, Profile, TokenStep
from expertmesh.config import ClusterConfig
from expertmesh.deployment import directory_address
from expertmesh.directory.client import scaling
from expertmesh.errors import ClusterError
from expertmesh.scaling.emulation import expert_cost
from expertmesh.v1 import directory_pb2
from loadtest.config import Shift, Skew
from router_service.connection import RouterSettings, open_transport
from router_service.dispatcher import Dispatcher
from router_service.replicas import LiveReplicas

EXPERTS, GROUPS = 16, 8
MAX_REPLICAS = 3
PAIR_MS = 16.0
"""Of the emulated device for one (row, expert) pair; a CPU of this machine needs some hundredth of it."""
SLO_MS = 1000.0
WINDOW_S = 5.0
DURATION_S, STEP_S = 65.0, 8.0
DRIFT_S = (20.0, 60.0)
SHIFT_EXPERTS = 6
"""Expert e becomes as popular as e - 6 was: the fourth group becomes the hot one."""
LOW, HIGH = 7.4, 11.0
"""Token steps per second: two and three replicas of the hot group's work."""
PROFILE = Profile(
    duration_s=DURATION_S,
    rates=((0.0, LOW), (STEP_S, LOW), (STEP_S + 1e-3, HIGH)),
    rows=2,
    before=Skew(kind="zipf", exponent=1.0),
    after=Skew(kind="zipf", exponent=1.0, shifts=(Shift(at_s=0, by=SHIFT_EXPERTS),)),
    drift_s=DRIFT_S,
)
SCALING = {"target_busy": 0.5, "queue_wait_ms": 200, "up_after_s": 2, "down_after_s": 12}
Scaling = Literal["per_group", "uniform"]
PER_GROUP: Scaling = "per_group"
UNIFORM: Scaling = "uniform"
AT_FIRST: dict[Scaling, list[int]] = {PER_GROUP: [2, *[1] * (GROUPS - 1)], UNIFORM: [2] * GROUPS}
POLICY = "benchmarks.switched_policy:SwitchedPolicy"
READY_S = 90.0
LOGICAL_CPUS, REPLICA_CPUS = 8, 0.1
"""As Ray counts them. Replicas of this benchmark mostly sleep."""
SEEN_EVERY_S, HELD_EVERY_S = 0.05, 1.0


def run(cluster: str | None) -> dict[str, object]:
    """`cluster` is not used: the tier is its own."""
    say(f"Ray and {GROUPS} groups start")
    with running_tier(LOGICAL_CPUS) as tier:
        config, switch = config_of(tier), tier.folder / "switch.json"
        hold(PER_GROUP).write(switch)
        tier.deploy(config, POLICY, switch=str(switch))
        runs: dict[Scaling, Run] = {}
        for name in AT_FIRST:
            hold(name).write(switch)
            settle(tier, name)
            runs[name] = one_run(tier, name, directory_address(config), switch)
    return figures(runs)


def config_of(tier: Tier) -> ClusterConfig:
    flops = expert_cost(tier.manifest).flops_per_pair
    device = {"teraflops": flops / (PAIR_MS * 1e-3) / 1e12, "memory_gb_per_s": 1000.0, "overhead_us": 500.0}
    size = EXPERTS // GROUPS
    groups = [
        {
            "name": name_of(number),
            "experts": f"{size * number}-{size * number + size - 1}",
            "num_cpus": REPLICA_CPUS,
            "max_replicas": MAX_REPLICAS,
            "emulated": device,
        }
        for number in range(GROUPS)
    ]
    return tier.configure(groups=groups, scaling=SCALING)


def name_of(group: int) -> str:
    return f"g{group}"


def hold(name: Scaling) -> Switch:
    return Switch(scaling="held", replicas={name_of(group): count for group, count in enumerate(AT_FIRST[name])})


def settle(tier: Tier, name: Scaling) -> None:
    """Waits until each group has just the replicas that this run begins with."""
    wanted, deadline = hold(name).replicas, time.monotonic() + READY_S
    while (states := tier.states()) != {group: ["RUNNING"] * count for group, count in wanted.items()}:
        if time.monotonic() > deadline:
            raise ClusterError(f"replicas are {states} after {READY_S:.0f} s; wanted: {wanted}")
        time.sleep(0.5)


@dataclass
class Run:
    """What was seen of one run; times are seconds from its start."""

    load: Load
    began_unix_s: float = 0.0
    held: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    """Replicas of each group that hold a device."""
    starting_s: list[float] = field(default_factory=list)
    """Moments at which some replica was starting."""
    ready_s: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Replica -> (its group, when the router could first send to it)."""
    first_row_s: dict[str, float] = field(default_factory=dict)
    changes: list[directory_pb2.ScalingDecision] = field(default_factory=list)
    """Decisions that changed a group's target; none of the baseline."""


def one_run(tier: Tier, name: Scaling, directory: str, switch: Path) -> Run:
    live, begin_with = LiveReplicas(), sum(AT_FIRST[name])
    transport = open_transport(RouterSettings(directory=directory), tier.manifest.fingerprint, live)
    try:
        deadline = time.monotonic() + 30
        while len(live.snapshot()) < begin_with:
            if time.monotonic() > deadline:
                raise ClusterError(f"the dispatcher reaches {len(live.snapshot())} of {begin_with} replicas")
            time.sleep(0.1)
        seen = Run(Load(Dispatcher(live, transport), tier.manifest, PROFILE))
        over = threading.Event()
        watching = [
            threading.Thread(target=watch_rows, args=(live, seen, over)),
            threading.Thread(target=watch_replicas, args=(tier, name, seen, over)),
        ]

        def started() -> None:
            seen.began_unix_s = time.time()
            Switch(scaling=name).write(switch)
            for thread in watching:
                thread.start()

        try:
            seen.load.run(started)
        finally:
            over.set()
            for thread in watching:
                thread.join()
        decided = [change for group in scaling(directory).groups for change in group.changes]
        seen.changes = [one for one in decided if one.decided_at >= seen.began_unix_s]
        return seen
    finally:
        transport.close()


def watch_rows(live: LiveReplicas, seen: Run, over: threading.Event) -> None:
    while not over.wait(SEEN_EVERY_S):
        now = time.monotonic() - seen.load.began
        for replica_id, replica in live.snapshot().items():
            replica.refresh()
            seen.ready_s.setdefault(replica_id, (replica.group, now))
            if replica.rows_sent:
                seen.first_row_s.setdefault(replica_id, now)


def watch_replicas(tier: Tier, name: str, seen: Run, over: threading.Event) -> None:
    while not over.wait(HELD_EVERY_S):
        try:
            states = tier.states()
        except ClusterError as error:
            say(f"{name}: one look at the replicas failed: {error}")
            continue
        now = time.monotonic() - seen.load.began
        held = {group: len(own) for group, own in states.items()}
        seen.held.append((now, held))
        if any(state == "STARTING" for own in states.values() for state in own):
            seen.starting_s.append(now)
        if len(seen.held) % 10 == 0:
            recent = [1000 * one.time_s for one in seen.load.steps if one.due_s > now - 10]
            p95 = f"{percentile(recent, 0.95):.0f} ms" if recent else "-"
            counts = " ".join(str(held.get(name_of(group), 0)) for group in range(GROUPS))
            say(f"{name} {now:3.0f} s: replicas {counts}, p95 {p95}, {len(seen.load.failures)} failed")


def figures(runs: dict[Scaling, Run]) -> dict[str, object]:
    seconds = {name: replica_seconds(one.held) for name, one in runs.items()}
    return {
        "device": f"emulated, {PAIR_MS:g} ms per (row, expert) pair",
        "replica_seconds": seconds,
        "replica_seconds_saved_vs_uniform": 1 - seconds[PER_GROUP] / seconds[UNIFORM],
        "slo_ms": SLO_MS,
        "slo_attainment": {name: attainment(one.load.steps) for name, one in runs.items()},
        "slo_attainment_at_rest": {name: attainment(one.load.steps, one.starting_s) for name, one in runs.items()},
        "p95_ms": {name: percentile([1000 * s.time_s for s in one.load.steps], 0.95) for name, one in runs.items()},
        "median_ms": {name: statistics.median(1000 * s.time_s for s in one.load.steps) for name, one in runs.items()},
        "token_steps": {name: len(one.load.steps) for name, one in runs.items()},
        "failed_requests": sum(len(one.load.failures) for one in runs.values()),
        "failures": sorted({failure for one in runs.values() for failure in one.load.failures})[:5],
        **reaction(runs[PER_GROUP], STEP_S, name_of(0)),
        "starts": {name: starts(one.held) for name, one in runs.items()},
        "sent_late_p99_ms": {
            name: percentile([1000 * s.late_s for s in r.load.steps], 0.99) for name, r in runs.items()
        },
        "series": {name: series(one) for name, one in runs.items()},
    }


def replica_seconds(held: list[tuple[float, dict[str, int]]]) -> float:
    """By the trapezoidal rule, over DURATION_S: before the first look as at the first, after the last as at it."""
    times = [now for now, _ in held]
    totals = [sum(counts.values()) for _, counts in held]
    inside = [now for now in times if 0 < now < DURATION_S]
    points = numpy.array([0.0, *inside, DURATION_S])
    return float(numpy.trapezoid(numpy.interp(points, times, totals), points))


def starts(held: list[tuple[float, dict[str, int]]]) -> int:
    """Replicas that were added in the run."""
    counts = [one for _, one in held]
    return sum(max(0, b[group] - a.get(group, 0)) for a, b in itertools.pairwise(counts) for group in b)


def windows(steps: list[TokenStep]) -> list[tuple[float, float]]:
    """(start, 95th percentile in ms) of each window that has token steps, by when they were due."""
    found: dict[int, list[float]] = {}
    for one in steps:
        found.setdefault(int(one.due_s // WINDOW_S), []).append(1000 * one.time_s)
    return [(WINDOW_S * number, percentile(times, 0.95)) for number, times in sorted(found.items())]


def attainment(steps: list[TokenStep], leave_out_s: Sequence[float] = ()) -> float:
    """Of all windows but those with one of these moments in them."""
    left_out = {WINDOW_S * (now // WINDOW_S) for now in leave_out_s}
    p95s = [p95 for start, p95 in windows(steps) if start not in left_out]
    return sum(p95 <= SLO_MS for p95 in p95s) / len(p95s) if p95s else math.nan


def reaction(seen: Run, at_s: float, group: str) -> dict[str, float]:
    """Of the group's first step up after `at_s`; raises ClusterError where there was none."""
    ups = [one.decided_at for one in seen.changes if one.group == group and one.target > one.target_before]
    decided = sorted(when - seen.began_unix_s for when in ups)
    if not decided or decided[0] < at_s:
        raise ClusterError(f"group {group} grew before {at_s:g} s or never")
    joined = sorted(
        (when, replica) for replica, (of, when) in seen.ready_s.items() if of == group and when > decided[0]
    )
    if not joined or joined[0][1] not in seen.first_row_s:
        raise ClusterError(f"group {group}: no row on a new replica after {at_s:g} s")
    ready_s, replica = joined[0]
    start_s = ready_s - decided[0]
    return {"reaction_s": seen.first_row_s[replica] - at_s - start_s, "replica_start_s": start_s}


def series(seen: Run) -> dict[str, Any]:
    """For pictures: all by seconds from the run's start."""
    return {
        "step_s": STEP_S,
        "drift_s": DRIFT_S,
        "held_s": [round(now, 2) for now, _ in seen.held],
        "replicas": {
            name_of(group): [counts.get(name_of(group), 0) for _, counts in seen.held] for group in range(GROUPS)
        },
        "window_s": [start for start, _ in windows(seen.load.steps)],
        "p95_ms": [round(p95, 1) for _, p95 in windows(seen.load.steps)],
        "token_steps_per_s": [
            sum(start <= one.due_s < start + WINDOW_S for one in seen.load.steps) / WINDOW_S
            for start, _ in windows(seen.load.steps)
        ],
        "changes": [
            [round(one.decided_at - seen.began_unix_s, 2), one.group, one.target, one.reason] for one in seen.changes
        ],
    }
