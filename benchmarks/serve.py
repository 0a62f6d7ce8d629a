"""A whole model over the OpenAI API: expertmesh, two groups of four experts, beside plain vLLM on the same machine.

Both sides run vLLM's own API server, so that the engine and what is behind it are compared. Plain vLLM has the whole
machine: its OpenMP threads are bound to all cores, which on two cores is faster than its default of one. expertmesh
has the engine arguments and the environment that `router_service.app` gives a router. `cluster_ratio_to_vllm` is of
the whole cluster, with Ray Serve in front, as `expertmesh up` starts it.

Plain vLLM's processes are stopped (SIGSTOP) while the other side has its turn: its worker polls for work, and takes
processor time from who shares the machine while it has none. An idle expertmesh sleeps, and is left as it is.

`cpu_ms_per_step` says what the time goes to: processor time of all threads of each kind of process, by the tokens of
one stream. What is not vLLM's, a replica or the client is `other`: the directory, and Ray behind Ray Serve.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import mixtral
from benchmarks.measure import alternate, median, median_ratio
from benchmarks.streams import Round, run_round
from expertmesh.args import RouterArgs
from expertmesh.cluster import launch, local_ray
from expertmesh.commands.up import bring_up
from expertmesh.config import ClusterConfig, EngineSection, GroupSection, ModelSection, ServerSection
from expertmesh.errors import ClusterError

WORK = Path(__file__).parents[1] / ".bench" / "mixtral"
MODEL = "mixtral"
GROUPS = {"a": "0-3", "b": "4-7"}
ENGINE = EngineSection(max_model_len=mixtral.MAX_LEN, kv_cache_gib=1, attention_threads=2)
CONCURRENCIES = (1, 4, 16, 64)
PROMPT_TOKENS, OUTPUT_TOKENS, PREFILL_TOKENS = 32, 64, 512
READY_S = 400.0
PLAIN, OURS = "vllm", "expertmesh"
SIGNS = {
    "api_server": "vllm.entrypoints.openai.api_server",
    "engine": "VLLM::EngineCore",
    "worker": "VLLM::Worker",
    "replicas": "-m expert_service",
}
"""What the command of a kind of process contains; expertmesh's worker is in its engine's process."""
KINDS = (*SIGNS, "client", "other")


def run(cluster: str | None) -> dict[str, object]:
    """`cluster` is not used: the servers are its own."""
    checkpoint, artifact = mixtral.make(WORK)
    with plain_server(checkpoint) as plain, split_server(artifact) as split:
        figures = compare(plain, split)
    with plain_server(checkpoint) as plain, whole_cluster(artifact) as whole:
        behind_serve = compare(plain, whole)
    return figures | {f"cluster_{key}": value for key, value in behind_serve.items()}


@dataclass(frozen=True)
class PlainServer:
    """Processes of plain vLLM, which are stopped but for their own turns."""

    url: str
    pid: int

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        self.go_on()
        try:
            yield
        finally:
            self.stop()

    def go_on(self) -> None:
        for process in self._processes():
            process.resume()

    def stop(self) -> None:
        for process in self._processes():
            process.suspend()

    def _processes(self) -> list[psutil.Process]:
        """None where it has ended: its clients fail then, and say so."""
        try:
            server = psutil.Process(self.pid)
            return [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def compare(plain: PlainServer, ours: str) -> dict[str, object]:
    """Figures per concurrency of both servers, which take turns; a ratio is the median over the rounds."""
    draw = random.Random(0)
    servers: dict[str, tuple[str, Callable[[], contextlib.AbstractContextManager[None]]]]
    servers = {PLAIN: (plain.url, plain.turn), OURS: (ours, contextlib.nullcontext)}

    def take(name: str, count: int, length: int, tokens: int) -> Round:
        url, turn = servers[name]
        prompts = [[draw.randrange(3, mixtral.VOCABULARY) for _ in range(length)] for _ in range(count)]
        with turn():
            return run_round(url, MODEL, prompts, tokens)

    figures: dict[str, dict[str, Any]] = {"ratio_to_vllm": {}, "tokens_per_s": {}}
    figures |= {"first_token_ms": {}, "inter_token_ms": {}, "cpu_ms_per_step": {}}

    def take_and_count(name: str, count: int) -> tuple[Round, dict[str, float]]:
        before = cpu_seconds()
        taken = take(name, count, PROMPT_TOKENS, OUTPUT_TOKENS)
        return taken, {kind: spent - before[kind] for kind, spent in cpu_seconds().items()}

    for count in CONCURRENCIES:
        counted = alternate({name: partial(take_and_count, name, count) for name in servers})
        rounds = {name: [one for one, _ in each] for name, each in counted.items()}
        speeds = {name: [one.tokens_per_s for one in each] for name, each in rounds.items()}
        case = str(count)
        figures["ratio_to_vllm"][case] = round(median_ratio(speeds[OURS], speeds[PLAIN]), 3)
        figures["tokens_per_s"][case] = {name: round(median(each), 1) for name, each in speeds.items()}
        figures["cpu_ms_per_step"][case] = {
            name: {kind: round(median([1e3 * spent[kind] / OUTPUT_TOKENS for _, spent in each]), 1) for kind in KINDS}
            for name, each in counted.items()
        }
        for key in ("first_token_ms", "inter_token_ms"):
            figures[key][case] = {
                name: round(median([getattr(one, key) for one in each]), 2) for name, each in rounds.items()
            }
    prefills = alternate({name: partial(take, name, 1, PREFILL_TOKENS, 1) for name in servers})
    times = {name: [one.first_token_ms for one in each] for name, each in prefills.items()}
    prefill = {name: round(median(each), 1) for name, each in times.items()}
    return figures | {
        "prefill_ms": prefill,
        "prefill_ratio_to_vllm": round(median_ratio(times[PLAIN], times[OURS]), 3),
    }


def cpu_seconds() -> dict[str, float]:
    """Processor time so far of this process and of those that it started, by kind."""
    found = dict.fromkeys(KINDS, 0.0) | {"client": time.process_time()}
    for process in psutil.Process().children(recursive=True):
        try:
            command, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue  # it has ended, or is about to
        kind = next((kind for kind, sign in SIGNS.items() if sign in command), "other")
        found[kind] += times.user + times.system
    return found


@contextlib.contextmanager
def plain_server(checkpoint: Path) -> Iterator[PlainServer]:
    """Plain vLLM with the whole machine; stopped once it is up."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    arguments = {"max_model_len": ENGINE.max_model_len, "kv_cache_memory_bytes": int(ENGINE.kv_cache_gib * 2**30)}
    with api_server(checkpoint, arguments, {"VLLM_CPU_OMP_THREADS_BIND": cores}) as (url, pid):
        server = PlainServer(url, pid)
        server.stop()
        try:
            yield server
        finally:
            server.go_on()  # a process that is stopped does not end


@contextlib.contextmanager
def split_server(artifact: Path) -> Iterator[str]:
    """A directory, a replica of each group and a router, every one a process; yields the router's URL."""
    from router_service import app

    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_printing_its_address(["-m", "expertmesh.directory"]))
        for group, experts in GROUPS.items():
            given = ["--artifact", str(artifact), "--group", group, "--experts", experts, "--directory", directory]
            stack.enter_context(_printing_its_address(["-m", "expert_service", *given]))
        args = RouterArgs(artifact=str(artifact), name=MODEL, engine=ENGINE, directory=directory)
        environment = app.environment(ENGINE)
        yield stack.enter_context(api_server(artifact / "trunk", app.engine_arguments(args), environment))[0]


@contextlib.contextmanager
def whole_cluster(artifact: Path) -> Iterator[str]:
    """The same on a local Ray cluster, with Ray Serve in front; yields the API's URL."""
    http, grpc = local_ray.free_ports(2)
    config = ClusterConfig(
        name="bench-serve",
        model=ModelSection(artifact=artifact, name=MODEL),
        engine=ENGINE,
        groups=tuple(GroupSection(name=name, experts=experts) for name, experts in GROUPS.items()),
        server=ServerSection(http_port=http, grpc_port=grpc),
    )
    path = WORK / "cluster.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    running = bring_up(launch.read_plan(path), None, READY_S)
    try:
        yield running.http
    finally:
        launch.stop(running)


@contextlib.contextmanager
def api_server(
    model: Path,
    arguments: Mapping[str, object],
    environment: Mapping[str, str],
    *,
    name: str = MODEL,
    logs: Path = WORK,
) -> Iterator[tuple[str, int]]:
    """vLLM's own, with these engine arguments; yields its URL and process id.

    Raises ClusterError where it does not come up.
    """
    port = local_ray.free_ports(1)[0]
    url = f"http://127.0.0.1:{port}"
    flags = ["--model", str(model), "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    for key, value in arguments.items():
        flags += _flag(key.replace("_", "-"), value)
    command = ["-m", "vllm.entrypoints.openai.api_server", *flags]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    log = logs / f"server-{port}.log"
    with log.open("wb") as output, _process(command, quiet | dict(environment), output) as process:
        _wait_until(lambda: _answers(f"{url}/health"), process, log)
        yield url, process.pid


def _flag(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


@contextlib.contextmanager
def _printing_its_address(command: list[str]) -> Iterator[str]:
    with _process(command, {"OMP_NUM_THREADS": "1"}, subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline().decode().strip()
        if not line:
            raise ClusterError(f"{' '.join(command[:2])} ended with {process.wait(10)}")
        yield line


@contextlib.contextmanager
def _process(command: list[str], environment: Mapping[str, str], output: Any) -> Iterator[subprocess.Popen[bytes]]:
    root = Path(__file__).parents[1]
    errors = None if output is subprocess.PIPE else subprocess.STDOUT
    with subprocess.Popen(
        [sys.executable, *command], cwd=root, env=os.environ | dict(environment), stdout=output, stderr=errors
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").splitlines() or ["nothing"]
            raise ClusterError(f"a server did not come up; it said last: {lines[-1]}")
        time.sleep(0.5)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
