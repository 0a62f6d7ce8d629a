"""A rebalance of real replicas with a real directory and a router under load, killed and continued at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Traffic
from mesh_cluster import MeshCluster, Silent, config_for

from expertmesh.artifact.manifest import read_manifest
from expertmesh.cluster import record
from expertmesh.cluster.record import Deployed, Record
from expertmesh.errors import ClusterError, ConfigError
from expertmesh.placement.plan import Plan, plan_text, read_plan_file
from expertmesh.rebalance.cluster import Cluster
from expertmesh.rebalance.journal import JournalFile
from expertmesh.rebalance.local import LocalCluster, Proposal
from expertmesh.rebalance.run import Patience, Progress

BEFORE = {"a": "0-3", "b": "4-7"}
AFTER = {"hot": "0", "a": "1-5", "rest": "6-7"}
STEPS = 8
PATIENCE = Patience(start_s=20, use_s=10, leave_s=20, answer_s=2, poll_s=0.02)
IMPATIENT = Patience(start_s=10, use_s=0.3, leave_s=20, answer_s=0.2, poll_s=0.02)


class Killed(BaseException):
    """As if the process ended there."""


class Mesh:
    """A cluster, its record, and the command line's view of it."""

    def __init__(self, artifact: Path, directory: str, groups: dict[str, str]) -> None:
        self.cluster = MeshCluster(artifact, directory)
        self.manifest = read_manifest(artifact)
        config = config_for(artifact, groups)
        self.record = Record(name="mesh", config="/mesh.yaml", dashboard="", http="", directory=directory, model="m")
        record.save(self.record)
        record.save_deployed("mesh", Deployed(source="/mesh.yaml", config=config))
        self.cluster.apply(config.groups)

    def local(
        self,
        show: Callable[[Progress], None] = lambda _: None,
        patience: Patience = PATIENCE,
        cluster: Cluster | None = None,
    ) -> LocalCluster:
        """What a new process would see."""
        return LocalCluster(self.record, show, patience, cluster or self.cluster)

    def plan(self, groups: dict[str, Any]) -> Plan:
        sections = [{"name": n, **(e if isinstance(e, dict) else {"experts": e})} for n, e in groups.items()]
        return Plan.model_validate({"fingerprint": self.manifest.fingerprint, "groups": sections})

    def propose(self, local: LocalCluster, groups: dict[str, Any], **options: bool) -> Proposal:
        return local.propose(self.plan(groups), "/plan.json", **options)

    def running(self) -> dict[str, str]:
        """Group -> experts, as the directory has them; all ready."""
        assert not [name for name, one in self.cluster.groups().items() if one.leaving]
        table = self.cluster.table()
        return {one.group: ",".join(map(str, one.layers[0].experts)) for one in table.replicas}

    def deployed(self) -> tuple[str, set[str]]:
        found = record.load_deployed(self.record)
        return found.source, {group.name for group in found.config.groups}


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def mesh(state: Path, tiny_artifact: Path, directory: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mesh]:
    monkeypatch.setattr("expert_service.replica.QUIET_S", 0.1)
    made = Mesh(tiny_artifact, directory, BEFORE)
    yield made
    made.cluster.close()


def assert_before(mesh: Mesh) -> None:
    assert mesh.running() == {"a": "0,1,2,3", "b": "4,5,6,7"}
    assert mesh.deployed() == ("/mesh.yaml", {"a", "b"})
    assert mesh.local().journals.read() is None


def assert_after(mesh: Mesh) -> None:
    running = mesh.running()
    (renamed,) = set(running) - {"hot", "rest"}
    assert renamed.startswith("a-")
    assert running == {"hot": "0", renamed: "1,2,3,4,5", "rest": "6,7"}
    assert mesh.deployed() == ("/plan.json", set(running))
    assert mesh.local().journals.read() is None


def test_there_and_back_under_load(mesh: Mesh, traffic: Traffic) -> None:
    shown: list[str] = []
    local = mesh.local(lambda progress: shown.append(progress.text))
    proposal = mesh.propose(local, AFTER)
    assert len(proposal.steps) == STEPS
    assert local.apply(proposal) == "done"
    assert_after(mesh)
    assert any("answers as others do for 10 experts" in line for line in shown)
    assert mesh.local().propose(mesh.plan(AFTER), "/plan.json").change.nothing
    local = mesh.local()
    assert local.apply(local.propose(read_plan_file(local.plan_before), "/mesh.yaml")) == "done"
    assert_before(mesh)


def test_group_by_group_where_there_is_no_room(mesh: Mesh, traffic: Traffic) -> None:
    mesh.cluster.cpus = mesh_cpus(mesh, 4)
    local = mesh.local()
    assert local.apply(mesh.propose(local, AFTER)) == "done"
    assert_after(mesh)
    assert mesh.cluster.most <= 4


def test_no_room_at_all(mesh: Mesh) -> None:
    mesh.cluster.cpus = mesh_cpus(mesh, 2)
    with pytest.raises(ConfigError, match="no order of its groups fits beside those that run"):
        mesh.propose(mesh.local(), AFTER)


def mesh_cpus(mesh: Mesh, for_groups: float) -> float:
    """CPUs of a cluster that has so many left beside the router and its ingress."""
    return for_groups + mesh.local().config.engine.num_cpus + 2


def kill_at(step: int, *, inside: bool) -> tuple[Callable[[Progress], None], Callable[..., None]]:
    """(show, before_step) that end the process where the step begins, or after its groups were applied."""

    def show(progress: Progress) -> None:
        if inside and progress.number == step + 1:
            raise Killed

    def before_step(journal: Any, _: Any) -> None:
        if not inside and journal.done == step:
            raise Killed

    return show, before_step


@pytest.mark.parametrize("way", ["resume", "abort"])
@pytest.mark.parametrize(("step", "inside"), [(0, False), (6, False), *((step, True) for step in range(STEPS))])
def test_killed_at_any_step(mesh: Mesh, traffic: Traffic, step: int, inside: bool, way: str) -> None:
    show, before_step = kill_at(step, inside=inside)
    local = mesh.local(show)
    local.rebalance.before_step = before_step
    with pytest.raises(Killed):
        local.apply(mesh.propose(local, AFTER))
    with pytest.raises(ClusterError, match=f"unfinished \\({step} of {STEPS} steps are done\\)"):
        mesh.local().check_idle()
    if way == "resume":
        assert mesh.local().resume() == "done"
        assert_after(mesh)
    else:
        assert mesh.local().abort() == "rolled back"
        assert_before(mesh)


def test_killed_on_the_way_back(mesh: Mesh, traffic: Traffic) -> None:
    """After the old groups had gone: they come back first, and again after each kill."""
    mesh.cluster.cpus = mesh_cpus(mesh, 4)
    show, before_step = kill_at(7, inside=False)
    local = mesh.local(show)
    local.rebalance.before_step = before_step
    with pytest.raises(Killed):
        local.apply(mesh.propose(local, AFTER))
    for step in (1, 2):
        show, before_step = kill_at(step, inside=False)
        local = mesh.local(show)
        local.rebalance.before_step = before_step
        with pytest.raises(Killed):
            local.abort()
    assert mesh.local().resume() == "rolled back"
    assert_before(mesh)


def test_killed_between_the_last_step_and_the_end(mesh: Mesh) -> None:
    local = mesh.local(patience=IMPATIENT)
    remember = local.rebalance.at_end

    def die(journal: Any) -> None:
        remember(journal)
        raise Killed

    local.rebalance.at_end = die
    with pytest.raises(Killed):
        local.apply(mesh.propose(local, AFTER))
    assert mesh.local(patience=IMPATIENT).abort() == "rolled back"
    assert_before(mesh)


def test_a_group_that_does_not_start_is_rolled_back(mesh: Mesh, traffic: Traffic) -> None:
    mesh.cluster.broken = {"rest"}
    local = mesh.local(patience=Patience(start_s=0.5, use_s=10, leave_s=20, answer_s=2, poll_s=0.02))
    assert local.apply(mesh.propose(local, AFTER)) == "rolled back"
    assert_before(mesh)
    last = local.journals.last()
    assert last is not None and last.reason == "not ready after 0 s: rest: here"


def test_a_group_that_answers_wrongly_is_rolled_back(mesh: Mesh, traffic: Traffic) -> None:
    """Its rows are compared before the old groups go; the few that a router sent it meanwhile are the router's risk."""
    mesh.cluster.liars = {"rest"}
    traffic.end()
    local = mesh.local()
    assert local.apply(mesh.propose(local, AFTER)) == "rolled back"
    assert_before(mesh)
    last = local.journals.last()
    assert last is not None and "group rest is not what it should be" in last.reason
    assert "of the row's RMS" in last.reason


def test_a_liar_is_no_witness_on_the_way_back(mesh: Mesh) -> None:
    """Group by group: the old group is gone already when a later one fails, and comes back beside it."""
    mesh.cluster.cpus = mesh_cpus(mesh, 4)
    mesh.cluster.liars = {"rest"}
    local = mesh.local(patience=Patience(start_s=20, use_s=0.2, leave_s=20, answer_s=2, poll_s=0.02))
    assert local.apply(mesh.propose(local, AFTER, in_steps=True)) == "rolled back"
    assert_before(mesh)


def test_without_traffic_it_goes_on_after_a_while(mesh: Mesh) -> None:
    local = mesh.local(patience=IMPATIENT)
    assert local.apply(mesh.propose(local, AFTER)) == "done"
    assert_after(mesh)


def test_routers_that_do_not_use_the_new_groups(mesh: Mesh, traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a firewall keeps them apart: the old groups stay."""
    traffic.await_steps(5)
    monkeypatch.setattr("router_service.replicas.LiveReplicas.add", lambda *_: None)
    local = mesh.local(patience=Patience(start_s=20, use_s=2, leave_s=20, answer_s=2, poll_s=0.02))
    assert local.apply(mesh.propose(local, AFTER)) == "rolled back"
    assert_before(mesh)
    last = local.journals.last()
    assert last is not None and "do they reach" in last.reason


def test_a_cluster_that_is_silent_for_a_moment(mesh: Mesh) -> None:
    local = mesh.local(cluster=Silent(mesh.cluster, 5), patience=IMPATIENT)
    assert local.apply(mesh.propose(local, AFTER)) == "done"


def test_a_cluster_that_stays_silent_leaves_a_journal(mesh: Mesh) -> None:
    silent = Silent(mesh.cluster, 0)
    local = mesh.local(cluster=silent, patience=IMPATIENT)
    proposal = mesh.propose(local, AFTER)
    silent.times = 10**6
    with pytest.raises(ClusterError, match="does not answer"):
        local.apply(proposal)
    assert mesh.local().abort() == "rolled back"
    assert_before(mesh)


def test_two_at_once(mesh: Mesh) -> None:
    journals = JournalFile(record.state_dir("mesh"))
    with journals.lock(), pytest.raises(ClusterError, match="another rebalance of mesh is under way"), journals.lock():
        pass
    with journals.lock():
        pass


def test_a_cluster_that_was_stopped_meanwhile(mesh: Mesh) -> None:
    local = mesh.local()
    proposal = mesh.propose(local, AFTER)
    record.forget(mesh.record)
    with pytest.raises(ClusterError, match="has the cluster been stopped"):
        local.apply(proposal)


def test_a_cluster_that_runs_other_groups_than_its_config(mesh: Mesh) -> None:
    mesh.cluster.apply(config_for(mesh.cluster.artifact, {**BEFORE, "c": "0"}).groups)
    with pytest.raises(ClusterError, match=r"not those that it was given last \(c\)"):
        mesh.propose(mesh.local(), AFTER)


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ({"a": "0-3", "c": "5-7"}, "layer 0: expert 4 is in no group"),
        ({"a": "0-3", "c": "4-8"}, "group c: experts: layer 0 has experts 0-7, not 8"),
        ({"a": "0-3", "c": {"experts": "4-7", "memory_gib": 1e-6}}, "group c: .* memory_gib is 1e-06"),
    ],
)
def test_bad_plans(mesh: Mesh, groups: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        mesh.propose(mesh.local(), groups)
    assert mesh.local().journals.read() is None


def test_a_plan_of_another_model(mesh: Mesh) -> None:
    plan = mesh.plan(AFTER).model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(ConfigError, match="made for the model with fingerprint 000000000000"):
        mesh.local().propose(plan, "/plan.json")


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"bounds": {"nobody": {"min_replicas": 2}}}, "bounds: unknown key"),
        ({"groups": [{"name": "a", "experts": "0-7", "min_replicas": 3, "max_replicas": 2}]}, "max_replicas 2 < min"),
        ({"groups": []}, "groups: "),
    ],
)
def test_plan_files_that_are_none(mesh: Mesh, tmp_path: Path, more: dict[str, Any], problem: str) -> None:
    import json

    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(plan_text(mesh.plan(AFTER))) | more))
    with pytest.raises(ConfigError, match=problem):
        read_plan_file(path)
