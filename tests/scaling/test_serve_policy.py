"""The adapter in Ray Serve's own autoscaling code, without a cluster; Ray's parts are those of 2.60."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import ray
from mesh import running_directory
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID, ReplicaMetricReport, TimeStampedValue
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from expertmesh.config import ClusterConfig, ScalingSection
from expertmesh.deployment import autoscaling_config
from expertmesh.directory.client import scaling
from expertmesh.scaling.samples import ASKED, METRICS, TARGETS, Samples, reported_targets, targets_as_stats
from expertmesh.scaling.serve_policy import GroupPolicy

pytestmark = pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")

DEPLOYMENT = DeploymentID("ExpertReplica", "experts-a")


@pytest.fixture
def directory() -> Iterator[str]:
    with running_directory() as address:
        yield address


FAST = {"up_after_s": 0.0, "down_after_s": 0.0}


def replica(number: int) -> ReplicaID:
    return ReplicaID(f"r{number}", DEPLOYMENT)


def metrics(
    *busy: object, at: float = 1.0, targets: Mapping[str, float] = FAST, **more: object
) -> dict[str, dict[ReplicaID, list[TimeStampedValue]]]:
    """What replicas 0, 1, … reported last; `more` replaces other values of all."""
    values = {"queue_wait_ms": 0.0, "rows_per_s": 5.0, "queued_rows": 0.0} | more
    values |= targets_as_stats(ScalingSection.model_validate(targets))
    found: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {name: {} for name in (*METRICS, *TARGETS)}
    for number, share in enumerate(busy):
        for name, value in ({"busy": share} | values).items():
            found[name][replica(number)] = [TimeStampedValue(at - 1, 0.1), TimeStampedValue(at, value)]  # type: ignore[arg-type]
    return found


def context(raw: Any, running: int, target: int | None = None, low: int = 1, high: int = 8) -> AutoscalingContext:
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name=DEPLOYMENT.name,
        app_name=DEPLOYMENT.app_name,
        current_num_replicas=running,
        target_num_replicas=running if target is None else target,
        running_replicas=[replica(number) for number in range(running)],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=raw,
        capacity_adjusted_min_replicas=low,
        capacity_adjusted_max_replicas=high,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=None,
    )


def test_written_against_this_version() -> None:
    assert ray.__version__ == "2.60.0"


def test_the_newest_report_of_each_running_replica_decides() -> None:
    policy = GroupPolicy("a")
    assert policy(context(metrics(1.0), 1)) == (2, {})
    assert policy(context(metrics(0.1, 0.1), 2)) == (1, {})
    assert policy(context(metrics(1.0, 1.0, 0.0), 2))[0] == 4, "the third runs no more"


@pytest.mark.parametrize("lie", [math.nan, math.inf, -1.0, 7.0, "busy", None, 10**400, [1]])
def test_what_is_no_measurement_does_not_count(lie: object) -> None:
    policy = GroupPolicy("a")
    assert policy(context(metrics(lie), 1))[0] == 1
    assert policy(context(metrics(lie), 1, low=0))[0] == 1
    assert policy.decide(context(metrics(0.6, lie, 0.6), 3)).counted == 2


@pytest.mark.parametrize("raw", [None, {}, {"busy": {replica(0): [TimeStampedValue(1.0, 1.0)]}}, {"busy": {}}])
def test_absent_reports_change_nothing(raw: Any) -> None:
    assert GroupPolicy("a")(context(raw, 3)) == (3, {})


def test_the_targets_are_those_of_most_replicas() -> None:
    """Which keep them while Serve's own config says nothing of them; one replica that lies changes nothing."""
    given = ScalingSection(target_busy=0.3, max_up_step=3)
    raw = metrics(0.5, 0.5, 0.5, targets=given.model_dump())
    everyone = [replica(number) for number in range(3)]
    raw["scaling_target_busy"][replica(1)] = [TimeStampedValue(2.0, 0.01)]
    assert reported_targets(everyone, raw) == given
    assert reported_targets([replica(1)], raw) == given.model_copy(update={"target_busy": 0.01})
    for lie in (math.nan, 0.0, -1.0, 7.0, "busy"):
        raw["scaling_target_busy"][replica(1)] = [TimeStampedValue(2.0, lie)]  # type: ignore[arg-type]
        assert reported_targets([replica(1)], raw) is None
    assert reported_targets(everyone, {}) is None
    raw["scaling_target_busy"][replica(1)] = [TimeStampedValue(2.0, 0.01)]
    assert reported_targets(everyone[:2], raw) is None, "one says this, the other that"
    policy = GroupPolicy("a")
    assert policy.decide(context(raw, 3)).asked == 5
    assert policy.decide(context({}, 3)).replicas == 3
    assert policy._targets == given, "the last that were said"


def test_targets_that_no_config_may_have_are_not_taken() -> None:
    for field, lie in [
        ("queue_wait_ms", math.inf),
        ("stale_after_s", 0.01),
        ("max_up_step", 1e9),
        ("down_after_s", 1e9),
    ]:
        raw = metrics(0.5, targets=FAST)
        raw[f"scaling_{field}"][replica(0)] = [TimeStampedValue(2.0, lie)]
        policy = GroupPolicy("a")
        policy.decide(context(raw, 1))
        assert policy._targets == ScalingSection(), field


def test_a_lone_replica_that_lies_of_its_targets_is_outvoted_once_two_others_report() -> None:
    """Until then it moves the group within its bounds alone."""
    wild = {"target_busy": 0.01, "up_after_s": 0.0, "max_up_factor": 100.0, "max_up_step": 10_000, "down_after_s": 0.0}
    policy = GroupPolicy("a")
    assert policy.decide(context(metrics(1.0, targets=wild), 1, high=8)).replicas == 8
    raw = metrics(1.0, 0.0, 0.0, targets=FAST)
    raw["scaling_target_busy"][replica(0)] = [TimeStampedValue(2.0, 0.01)]
    assert policy.decide(context(raw, 3, target=8)).replicas == 7
    assert policy._targets == ScalingSection.model_validate(FAST)


def test_so_many_replicas_are_asked_for_targets_and_silent_ones_are_not_counted() -> None:
    given, other = ScalingSection(target_busy=0.3), ScalingSection(target_busy=0.4)
    replicas = [replica(number) for number in range(4 * ASKED)]
    raw = metrics(*[0.5] * len(replicas), targets=other.model_dump())
    for number, one in enumerate(replicas):
        if number < ASKED:
            del raw["scaling_target_busy"][one]
        elif number < 2 * ASKED:
            raw["scaling_target_busy"][one] = [TimeStampedValue(2.0, given.target_busy)]
    assert reported_targets(replicas, raw) == given
    assert reported_targets(replicas[ASKED + 1 :], raw) == given
    assert reported_targets(replicas[2 * ASKED - 1 :], raw) == other


def test_a_replica_that_says_nothing_new_falls_silent() -> None:
    """By the time since its last sample came, so that its clock does not matter."""
    samples, ids = Samples(), [replica(0)]
    (one,) = samples.loads(ids, metrics(0.5, at=1e9), 100.0)
    assert one.age_s == 0.0
    (one,) = samples.loads(ids, metrics(0.5, at=1e9), 112.0)
    assert one.age_s == 12.0
    (one,) = samples.loads(ids, metrics(0.5, at=1e9 + 1), 113.0)
    assert one.age_s == 0.0


def test_nothing_escapes_and_the_directory_hears_of_it(directory: str) -> None:
    policy = GroupPolicy("a", directory)
    assert policy(context(metrics(1.0), 1))[0] == 2
    broken = context(object(), 2)
    broken.running_replicas = 5  # type: ignore[assignment]
    assert policy(broken) == (2, {})
    told = _told(directory, lambda one: bool(one.last.error))
    assert "TypeError" in told.last.error
    assert (told.last.target, told.last.target_before) == (2, 1), "those of the last decision"
    assert [(one.target_before, one.target) for one in told.changes] == [(1, 2)]
    policy(context(metrics(0.6, 0.6), 2))
    told = _told(directory, lambda one: not one.last.error)
    assert (told.last.counted, told.last.min_replicas, told.last.max_replicas) == (2, 1, 8)
    assert told.last.busy == pytest.approx(0.6)
    assert told.since_success_s >= 0


def test_without_reports_the_directory_learns_that_nothing_can_be_decided(directory: str) -> None:
    GroupPolicy("a", directory)(context({}, 2))
    assert _told(directory, lambda one: True).last.error.startswith("no report of 2 running replicas counts")


def test_a_directory_that_is_away_delays_nobody() -> None:
    policy = GroupPolicy("a", "127.0.0.1:1")
    fast = FAST | {"max_up_factor": 100}
    began = time.monotonic()
    for running in range(1, 200):
        assert policy(context(metrics(*[1.0] * running, at=running, targets=fast), running, high=1000))[0] > running
    assert time.monotonic() - began < 60, "each would wait for 2 s"


def test_a_decision_that_changes_the_target_is_logged_with_its_inputs(caplog: pytest.LogCaptureFixture) -> None:
    policy = GroupPolicy("a")
    with caplog.at_level("INFO"):
        policy(context(metrics(0.6), 1))
        policy(context(metrics(0.93, queue_wait_ms=4.0), 1))
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("ray.serve")]
    assert line.startswith("group a: 1 -> 2 replicas; busy 93% of 60%")
    assert "r0 busy 0.93 wait 4.0 ms 5.0 rows/s" in line


def in_serve() -> tuple[DeploymentAutoscalingState, Any]:
    """Ray's state of a deployment, and what gives it a config: takes config and target, gives the target after it."""
    state = DeploymentAutoscalingState(DEPLOYMENT)

    def register(config: dict[str, Any], target: int) -> int:
        deployment = DeploymentConfig(autoscaling_config=AutoscalingConfig.model_validate(config))
        info = DeploymentInfo(deployment, ReplicaConfig.create(lambda: None), 0, "job", version="1")
        return int(state.register(info, target))

    return state, register


def autoscaling_of(**group: Any) -> dict[str, Any]:
    described = {"model": {"artifact": "/art"}, "groups": [{"name": "a", "experts": "0-3"} | group]}
    config = ClusterConfig.model_validate(described)
    made = autoscaling_config(config, config.groups[0])
    made["policy"]["policy_kwargs"]["directory"] = None
    return made


def test_serve_does_at_once_what_the_policy_says() -> None:
    fast = autoscaling_of(max_replicas=6)
    state, register = in_serve()
    assert register(fast, 1) == 1
    state.update_running_replica_ids([replica(0)])
    for share, target, wanted in [(1.0, 1, 2), (0.6, 1, 1)]:
        report(state, 0, share)
        assert state.get_decision_num_replicas(target) == wanted
    state.update_running_replica_ids([replica(number) for number in range(4)])
    for number in range(4):
        report(state, number, 0.05)
    assert state.get_decision_num_replicas(4) == 3, "max_down_step"


def test_a_changed_config_keeps_the_replicas() -> None:
    _state, register = in_serve()
    register(autoscaling_of(max_replicas=6), 4)
    assert register(autoscaling_of(max_replicas=5), 4) == 4
    assert register(autoscaling_of(max_replicas=3), 4) == 3
    assert register(autoscaling_of(min_replicas=5, max_replicas=5), 3) == 5


def test_an_idle_group_goes_to_zero_in_serve() -> None:
    config = autoscaling_of(min_replicas=0, max_replicas=6)
    state, register = in_serve()
    assert register(config, 0) == 0, "asleep at first"
    state.update_running_replica_ids([replica(0)])
    report(state, 0, 0.0, rows_per_s=0.0, targets=FAST | {"idle_after_s": 0.05})
    assert state.get_decision_num_replicas(1) == 1
    time.sleep(0.06)
    assert state.get_decision_num_replicas(1) == 0


def report(
    state: DeploymentAutoscalingState,
    number: int,
    busy: float,
    rows_per_s: float = 5.0,
    targets: Mapping[str, float] = FAST,
) -> None:
    raw = metrics(*[busy] * (number + 1), at=time.time(), targets=targets, rows_per_s=rows_per_s)
    series = {name: found[replica(number)] for name, found in raw.items()}
    state.record_request_metrics_for_replica(ReplicaMetricReport(replica(number), series, time.time()))


def test_ray_can_pickle_it() -> None:
    """As the controller gets it."""
    policy = AutoscalingConfig.model_validate(autoscaling_of(max_replicas=2)).policy
    made = pickle.loads(policy.get_serialized_policy_def())
    assert made(**policy.policy_kwargs)(context(metrics(0.6), 1)) == (1, {})


def _told(directory: str, condition: Any) -> Any:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = [one for one in scaling(directory).groups if one.last.group == "a"]
        if found and condition(found[0]):
            return found[0]
        time.sleep(0.02)
    raise AssertionError("the directory was not told")
