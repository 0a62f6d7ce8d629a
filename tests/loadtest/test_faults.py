"""Faults on real processes: a directory and replicas that carry a cluster's marker, as `up` starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import torch
import yaml
from certificates import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mesh import TRANSPORTS, group_args, running_directory, running_dispatcher
from session_cluster import Cluster

from expert_service.replica import Replica
from expertmesh.cluster.processes import MARKER
from expertmesh.cluster.record import Record
from expertmesh.directory.client import list_table
from expertmesh.errors import ClusterError, ConfigError
from expertmesh.v1 import directory_pb2
from loadtest.config import Fault, RunConfig
from loadtest.corrupt_replica import SUFFIX, corrupt_replica
from loadtest.endpoint import Endpoint
from loadtest.faults import Injector, Victim, find_victim, inflict
from loadtest.partition import cut_off
from loadtest.records import FaultRecord
from loadtest.target import Clock
from router_service.dispatcher import Dispatcher

MARK = "loadtest-faults"
PATIENCE_S = 60.0
CORRUPTIONS = ["rows", "dtype", "nan", "checksum"]
REASONS = {"rows": "error", "dtype": "error", "nan": "not_finite", "checksum": "checksum"}
HIDDEN_SIZE = 256


@dataclass
class Processes:
    record: Record
    start_replica: Callable[[], int]
    """Returns its pid when the directory lists it."""

    def replicas(self) -> list[directory_pb2.Replica]:
        return list(list_table(self.record.directory).replicas)


@pytest.fixture
def processes(demo_artifact: Path, tmp_path: Path) -> Iterator[Processes]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[int, str]:
        """Its pid and the address that it prints."""
        environment = os.environ | {MARKER: MARK}
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        return process.pid, process.stdout.readline().strip()

    _, directory = start("expertmesh.directory")
    config = tmp_path / "cluster.yaml"
    described = {"model": {"artifact": str(demo_artifact)}, "groups": [{"name": "a", "experts": "0-15"}]}
    config.write_text(yaml.safe_dump(described | {"engine": {"checksums": True}}))
    record = Record(
        name="ours", config=str(config), dashboard="", http="", directory=directory, model="demo", marker=MARK
    )

    def start_replica() -> int:
        options = ("--artifact", str(demo_artifact), "--group", "a", "--experts", "0-15", "--directory", directory)
        pid, _ = start("expert_service", *options)
        until(lambda: pid in [replica.pid for replica in list_table(directory).replicas])
        return pid

    try:
        yield Processes(record, start_replica)
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def partitions_allowed() -> None:
    """Routing rules are root's to change, and not in every container."""
    try:
        with cut_off(1):
            pass
    except ClusterError as error:
        pytest.skip(str(error))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s"
        time.sleep(0.01)


def record_of(cluster: Cluster) -> Record:
    path = Path(cluster.environment["XDG_STATE_HOME"]) / "expertmesh" / "tests" / "cluster.json"
    return Record.model_validate_json(path.read_bytes())


def logs(cluster: Record) -> str:
    """Of all processes of the cluster."""
    files = (Path(str(cluster.temp_dir)) / "session_latest" / "logs").rglob("*")
    return "".join(file.read_text(errors="replace") for file in files if file.is_file())


def rules() -> str:
    return subprocess.run(["ip", "rule"], capture_output=True, text=True, check=True).stdout


def injector(cluster: Record | None, *faults: dict[str, Any]) -> Injector:
    config = RunConfig.model_validate(
        {
            "target": {"kind": "experts", "cluster": "ours"},
            "stages": [{"name": "s", "duration_s": 1, "arrivals": {"kind": "constant", "rate": 1}}],
            "faults": faults,
        }
    )
    return Injector(config, Endpoint(None, None, cluster.directory if cluster else None, cluster))


def inject(cluster: Record, seconds: float, *faults: dict[str, Any]) -> list[FaultRecord]:
    made = injector(cluster, *faults)
    made.start(Clock(time.monotonic()), 2)
    time.sleep(seconds)
    return made.stop()


def test_kill(processes: Processes) -> None:
    pid = processes.start_replica()
    (replica,) = processes.replicas()
    made = injector(processes.record, {"kind": "kill", "at_s": 0.2, "group": "a"})
    made.start(Clock(time.monotonic()), 2)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    (done,) = made.stop()
    assert (done.repeat, done.kind, done.target, done.until_s, done.error) == (2, "kill", replica.replica_id, None, "")
    assert done.at_s >= 0.2


def test_hang(processes: Processes) -> None:
    pid = processes.start_replica()
    made = injector(processes.record, {"kind": "hang", "at_s": 0, "group": "a", "for_s": 0.5})
    made.start(Clock(time.monotonic()), 0)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    until(lambda: psutil.Process(pid).status() != psutil.STATUS_STOPPED)
    (done,) = made.stop()
    assert done.until_s is not None and done.until_s - done.at_s >= 0.5


@pytest.mark.usefixtures("partitions_allowed")
def test_partition(processes: Processes) -> None:
    """The replica's port is silent, the directory still hears from it, and afterwards the same connection goes on."""
    processes.start_replica()
    (replica,) = processes.replicas()
    with grpc.insecure_channel(replica.address) as channel:
        ask = health_pb2_grpc.HealthStub(channel).Check
        ask(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        made = injector(processes.record, {"kind": "partition", "at_s": 0, "group": "a", "for_s": 600})
        made.start(Clock(time.monotonic()), 0)
        until(lambda: f"dport {replica.address.rpartition(':')[2]} blackhole" in rules())
        with pytest.raises(grpc.RpcError) as silence:
            ask(health_pb2.HealthCheckRequest(), timeout=0.5)
        assert silence.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert processes.replicas()
        (done,) = made.stop()
        assert (done.kind, done.error) == ("partition", "") and done.until_s is not None
        ask(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)


@pytest.mark.usefixtures("partitions_allowed")
def test_partitions_leave_the_rules_as_they_were() -> None:
    before = rules()
    with cut_off(1), cut_off(2):
        assert rules().count("blackhole") == 4
    assert rules() == before


@pytest.mark.usefixtures("partitions_allowed")
def test_a_partition_that_is_not_allowed_is_told() -> None:
    script = "from loadtest.partition import cut_off\nwith cut_off(1): pass"
    without = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    tried = subprocess.run([*without, sys.executable, "-c", script], capture_output=True, text=True, check=False)
    said = tried.stderr.splitlines()[-1]
    assert said.startswith("expertmesh.errors.ClusterError: a partition needs CAP_NET_ADMIN: ip rule add: "), said


def test_a_run_that_ends_leaves_nothing_stopped(processes: Processes) -> None:
    pid = processes.start_replica()
    made = injector(processes.record, {"kind": "hang", "at_s": 0, "group": "a", "for_s": 600})
    made.start(Clock(time.monotonic()), 0)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    made.stop()
    assert psutil.Process(pid).status() != psutil.STATUS_STOPPED


def test_slow(processes: Processes) -> None:
    """A replica four times slower is found stopped in about three of four looks."""
    pid = processes.start_replica()
    made = injector(processes.record, {"kind": "slow", "at_s": 0, "group": "a", "for_s": 600, "factor": 4})
    made.start(Clock(time.monotonic()), 0)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    looks = []
    for _ in range(300):
        looks.append(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        time.sleep(0.007)
    made.stop()
    assert 0.5 < sum(looks) / len(looks) < 0.95
    assert psutil.Process(pid).status() != psutil.STATUS_STOPPED


def test_faults_that_are_not_due_yet_are_dropped(processes: Processes) -> None:
    processes.start_replica()
    assert inject(processes.record, 0.1, {"kind": "kill", "at_s": 60, "group": "a"}) == []


def test_a_replica_that_is_not_there_is_told(processes: Processes) -> None:
    processes.start_replica()
    (done,) = inject(processes.record, 1.0, {"kind": "kill", "at_s": 0, "group": "a", "replica": 3})
    assert done.error == "group a has 1 replicas now, none with number 3"


def test_a_process_of_others_is_spared(processes: Processes) -> None:
    """The directory's entry names a pid; the marker decides whether it may be hit."""
    pid = processes.start_replica()
    foreign = processes.record.model_copy(update={"marker": "another"})
    (done,) = inject(foreign, 1.0, {"kind": "kill", "at_s": 0, "group": "a"})
    assert f"process {pid} was not started by `expertmesh up` for ours" in done.error
    assert psutil.Process(pid).is_running() and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_clusters_of_others_and_unknown_groups_are_refused(processes: Processes) -> None:
    processes.start_replica()
    kill = {"kind": "kill", "at_s": 0, "group": "b"}
    with pytest.raises(ConfigError, match=r"faults\.0\.group: the cluster has no group 'b' \(groups: a\)"):
        injector(processes.record, kill)
    with pytest.raises(ConfigError, match="'ours' was not started on this machine"):
        injector(processes.record.model_copy(update={"marker": None}), kill)
    with pytest.raises(ConfigError, match="no cluster is named"):
        injector(None, kill)
    with pytest.raises(ClusterError, match="does not answer"):
        injector(processes.record.model_copy(update={"directory": "127.0.0.1:1"}), kill)


def step(router: Dispatcher) -> torch.Tensor:
    """Rows of the first layer, all to an expert of the session cluster's group b: one message each time."""
    rows = torch.randn(6, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    return router.finish(router.start(0, rows, torch.full((6, 1), 4), torch.ones(6, 1)))


def members(directory: str) -> set[str]:
    return {replica.replica_id for replica in list_table(directory).replicas}


def find_out(router: Dispatcher, directory: str, real: set[str], expected: torch.Tensor) -> str:
    """Steps until the router gives a corrupt replica no more rows, whose id it returns; no sum may have changed."""
    rest: set[str] = set()

    def found() -> bool:
        assert torch.equal(step(router), expected)
        rest.update(router.replicas.suspended())
        return bool(rest)

    until(found)
    assert rest == members(directory) - real and router.counters.resent_rows > 0
    (corrupt,) = rest
    assert corrupt.endswith(SUFFIX)
    return corrupt


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("what", CORRUPTIONS)
def test_corrupt(processes: Processes, demo_artifact: Path, what: str, transport: str) -> None:
    processes.start_replica()
    (real,) = processes.replicas()
    directory = processes.record.directory
    made = injector(processes.record, {"kind": "corrupt", "at_s": 0, "group": "a", "for_s": 600, "what": what})
    with running_dispatcher(demo_artifact, directory, transport, checksums=True) as router:
        expected = step(router)
        made.start(Clock(time.monotonic()), 0)
        find_out(router, directory, {real.replica_id}, expected)
        assert router.replicas.suspensions()["since_start"]["a"].keys() >= {REASONS[what]}
        (done,) = made.stop()
        assert (done.kind, done.target, done.error) == ("corrupt", real.replica_id, "") and done.until_s is not None
        assert members(directory) == {real.replica_id}
        assert torch.equal(step(router), expected)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_corrupt_replica_shows_the_certificate_of_the_cluster(
    demo_artifact: Path, tmp_path: Path, transport: str
) -> None:
    tls = Authority(tmp_path).issue()
    config = tmp_path / "cluster.yaml"
    described = {"model": {"artifact": str(demo_artifact)}, "groups": [{"name": "a", "experts": "0-15"}]}
    config.write_text(yaml.safe_dump(described | {"security": {"tls": tls.model_dump(mode="json")}}))
    with running_directory() as directory:
        record = Record(name="ours", config=str(config), dashboard="", http="", directory=directory, model="demo")
        real = Replica(group_args(demo_artifact, directory, "a", set(range(16)), tls=tls), directory)
        fault, stop = Fault(at_s=0, kind="corrupt", group="a", for_s=600), threading.Event()
        victim = Victim(real.replica_id, psutil.Process(), record, real.entry())
        try:
            with running_dispatcher(demo_artifact, directory, transport, tls) as router, ThreadPoolExecutor(1) as pool:
                expected = step(router)
                inflicted = pool.submit(inflict, fault, victim, stop)
                try:
                    find_out(router, directory, {real.replica_id}, expected)
                finally:
                    stop.set()
                assert inflicted.result(PATIENCE_S) > 0
        finally:
            real.stop()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_sums_that_only_a_checksum_tells_are_used_without(
    processes: Processes, demo_artifact: Path, transport: str
) -> None:
    processes.start_replica()
    (real,) = processes.replicas()
    directory = processes.record.directory
    with running_dispatcher(demo_artifact, directory, transport) as router:
        expected = step(router)
        with corrupt_replica(real, "checksum", directory, None) as made:
            until(lambda: not torch.equal(step(router), expected))
        assert made.answers > 0 and not router.replicas.suspensions()["since_start"]


def test_what_no_router_would_notice_is_refused(processes: Processes) -> None:
    processes.start_replica()
    config = Path(processes.record.config)
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"engine": {}}))
    corrupt = {"kind": "corrupt", "at_s": 0, "group": "a", "for_s": 600, "what": "checksum"}
    (done,) = inject(processes.record, 1.0, corrupt)
    assert done.error == "corrupt: checksum: without engine.checksums the wrong sums would be used"


def test_others_never_hit_a_corrupt_replica(processes: Processes) -> None:
    """Which of a group's replicas is meant does not depend on it."""
    processes.start_replica()
    (real,) = processes.replicas()
    with corrupt_replica(real, "nan", processes.record.directory, None):
        until(lambda: len(processes.replicas()) == 2)
        kill = Fault(at_s=0, kind="kill", group="a")
        assert find_victim(kill, processes.record).name == real.replica_id
        with pytest.raises(ClusterError, match="group a has 1 replicas now, none with number 1"):
            find_victim(kill.model_copy(update={"replica": 1}), processes.record)


@pytest.mark.cluster
@pytest.mark.parametrize("what", CORRUPTIONS)
def test_a_served_router_finds_a_corrupt_replica_out(cluster: Cluster, demo_artifact: Path, what: str) -> None:
    """It says so in its log, as one in this process does otherwise; no request fails, no greedy answer differs."""

    def complete() -> str:
        asked = {"model": cluster.model, "prompt": "import ", "max_tokens": 32, "temperature": 0}
        answer = httpx.post(f"{cluster.http}/v1/completions", json=asked, timeout=180).raise_for_status()
        return str(answer.json()["choices"][0]["text"])

    record = record_of(cluster)
    real = members(record.directory)
    usual = complete()
    made = injector(record, {"kind": "corrupt", "at_s": 0, "group": "b", "for_s": 600, "what": what})
    with running_dispatcher(demo_artifact, record.directory, checksums=True) as router:
        expected = step(router)
        made.start(Clock(time.monotonic()), 0)
        try:
            corrupt = find_out(router, record.directory, real, expected)
            answers: list[str] = []

            def told() -> bool:
                answers.append(complete())
                return len(answers) >= 4 and f"replica {corrupt} gets no rows" in logs(record)

            until(told)
        finally:
            (done,) = made.stop()
    assert set(answers) == {usual}
    assert done.error == "" and members(record.directory) == real
    assert complete() == usual


@pytest.mark.cluster
def test_restart_directory(cluster: Cluster) -> None:
    """Another directory takes over, and all replicas are in it again."""
    record = record_of(cluster)
    before = list_table(record.directory)
    made = injector(record, {"kind": "restart_directory", "at_s": 0})
    made.start(Clock(time.monotonic()), 0)

    def replaced() -> bool:
        try:
            now = list_table(record.directory)
        except ClusterError:
            return False
        members = {replica.replica_id for replica in now.replicas}
        return now.directory_id != before.directory_id and members >= {one.replica_id for one in before.replicas}

    until(replaced)
    (done,) = made.stop()
    assert (done.target, done.error) == ("directory", "")


def test_threads_end_with_the_run(processes: Processes) -> None:
    processes.start_replica()
    inject(processes.record, 0.0, {"kind": "slow", "at_s": 0, "group": "a", "for_s": 600})
    assert not [thread for thread in threading.enumerate() if thread.name == "loadtest-fault"]


def command(cluster: Record, state: Path, *arguments: str) -> subprocess.Popen[str]:
    """`expertmesh fault`, with a record of the cluster as `up` writes it."""
    folder = state / "expertmesh" / cluster.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cluster.json").write_text(cluster.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "expertmesh", "fault", *arguments],
        env=os.environ | {"XDG_STATE_HOME": str(state)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_kills(processes: Processes, tmp_path: Path) -> None:
    pid = processes.start_replica()
    (replica,) = processes.replicas()
    out, _ = command(processes.record, tmp_path, "kill", "a", "--json").communicate(timeout=PATIENCE_S)
    assert json.loads(out) == {"kind": "kill", "target": replica.replica_id, "pid": pid, "for_s": None}
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_the_command_interrupted_lets_the_replica_run_on(processes: Processes, tmp_path: Path) -> None:
    pid = processes.start_replica()
    running = command(processes.record, tmp_path, "hang", "a", "--for", "600")
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130 and said.startswith("hang for 600 s: ")
    assert psutil.Process(pid).status() != psutil.STATUS_STOPPED


def test_the_command_corrupts(processes: Processes, tmp_path: Path) -> None:
    pid = processes.start_replica()
    (real,) = processes.replicas()
    running = command(processes.record, tmp_path, "corrupt", "a", "--for", "0.5", "--what", "nan", "--json")
    out, said = running.communicate(timeout=PATIENCE_S)
    told = {"kind": "corrupt", "target": real.replica_id, "pid": pid, "for_s": 0.5, "what": "nan", "answers": 0}
    assert json.loads(out) == told, said
    assert members(processes.record.directory) == {real.replica_id}


def test_the_command_interrupted_takes_the_corrupt_replica_away(processes: Processes, tmp_path: Path) -> None:
    processes.start_replica()
    (real,) = processes.replicas()
    running = command(processes.record, tmp_path, "corrupt", "a", "--for", "600")
    until(lambda: len(processes.replicas()) == 2)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130
    assert members(processes.record.directory) == {real.replica_id}


def test_the_command_refuses(processes: Processes, tmp_path: Path) -> None:
    pid = processes.start_replica()
    cases: tuple[tuple[dict[str, Any], tuple[str, ...], str], ...] = (
        ({}, ("kill", "b"), "group b has 0 replicas now, none with number 0"),
        ({}, ("kill", "a", "--replica", "4"), "group a has 1 replicas now, none with number 4"),
        ({"marker": None}, ("kill", "a"), "cluster 'ours' was not started on this machine"),
        ({"marker": "another"}, ("kill", "a"), "was not started by `expertmesh up` for ours"),
        ({"directory": "127.0.0.1:1"}, ("kill", "a"), "does not answer"),
        ({}, ("kill", "a", "--cluster", "theirs"), "theirs"),
    )
    started = []
    for number, (changed, arguments, _) in enumerate(cases):
        started.append(command(processes.record.model_copy(update=changed), tmp_path / str(number), *arguments))
    for refused, (_, _, said) in zip(started, cases, strict=True):
        _, line = refused.communicate(timeout=PATIENCE_S)
        assert refused.returncode == 1 and said in line and len(line.splitlines()) == 1, line
    assert psutil.Process(pid).status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED}
