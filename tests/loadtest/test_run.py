"""A run against a stub server: everything that was due is accounted for, whatever the server does."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from stub import ROOT, StubServer, config_for, execute_quietly, poisson, run_command, stub_server

from loadtest.records import Run
from loadtest.verdict import judge

SHORT = {"output_tokens": {"kind": "fixed", "value": 6}, "prompt_tokens": {"kind": "fixed", "value": 16}}


@pytest.fixture(scope="module")
def stub() -> Iterator[StubServer]:
    with stub_server("--ttft", "0.05", "--itl", "0.01") as server:
        yield server


def run_against(stub: StubServer, *stages: dict[str, Any], **sections: Any) -> Run:
    sections = {"workload": SHORT} | sections
    return execute_quietly(config_for(stub.url, *(stages or [poisson(20, 2)]), **sections))


@pytest.mark.parametrize(
    ("misbehaviour", "status", "said"),
    [
        ("busy", "rejected", "HTTP 429: too many requests"),
        ("broken", "server_error", "HTTP 500: engine is dead"),
        ("error_event", "server_error", "engine is dead"),
        ("hangup", "disconnected", ""),
        ("html", "bad_answer", "an answer of type text/html, not text/event-stream"),
    ],
)
def test_errors_have_their_class(stub: StubServer, misbehaviour: str, status: str, said: str) -> None:
    run = run_against(stub, workload=SHORT | {"body": {"stub": misbehaviour}}, client={"warmup_requests": 0})
    assert len(run.records) > 20
    assert {record.status for record in run.records} == {status}
    assert {record.error for record in run.records} == {said} or not said
    verdict = judge(run, config_for(stub.url, poisson(20, 2)))
    assert (verdict.figures.errors, verdict.figures.good_share) == (len(run.records), 0)


def test_requests_that_take_too_long_are_timeouts() -> None:
    with stub_server("--ttft", "0.05", "--itl", "1") as slow:
        run = run_against(slow, target={"timeout_s": 0.07}, client={"warmup_requests": 0})
    assert {(record.status, record.error) for record in run.records} == {("timeout", "no end within 0.07 s")}
    assert {len(record.token_times) for record in run.records} <= {0, 1}


def test_what_is_open_when_the_drain_is_over_is_a_timeout() -> None:
    with stub_server("--ttft", "30") as slow:
        run = run_against(slow, client={"warmup_requests": 0, "drain_s": 0.5})
    assert {record.status for record in run.records} == {"timeout"}
    assert {record.error for record in run.records} == {"no end within 0.5 s after the last stage"}
    assert len(run.records) > 20


def test_cancelled_requests_hang_up_and_the_server_notices(stub: StubServer) -> None:
    cancel = {"share": 0.5, "after_tokens": {"kind": "fixed", "value": 2}}
    run = run_against(stub, poisson(40, 3), workload=SHORT | {"cancel": cancel})
    found = Counter(record.status for record in run.records)
    assert set(found) == {"ok", "cancelled"}
    assert found["cancelled"] / len(run.records) == pytest.approx(0.5, abs=0.2)
    assert {len(record.token_times) for record in run.records if record.status == "cancelled"} == {2}
    assert judge(run, config_for(stub.url, poisson(40, 3))).figures.due == found["ok"]


def test_turns_carry_the_conversation_on(stub: StubServer) -> None:
    turns = {"number": {"kind": "fixed", "value": 3}, "think_s": 0.2}
    for api in ("completions", "chat"):
        run = run_against(stub, poisson(5, 2), workload=SHORT | {"turns": turns}, target={"api": api})
        sessions: dict[int, list[Any]] = {}
        for record in run.records:
            sessions.setdefault(record.index, []).append(record)
        assert {len(of) for of in sessions.values()} == {3}
        for first, second, third in sessions.values():
            assert [one.turn for one in (first, second, third)] == [0, 1, 2]
            # each turn adds its own 16 tokens and the stub's answer of 6 times " word"
            assert second.prompt_tokens - first.prompt_tokens >= 16 + 6
            assert third.prompt_tokens - second.prompt_tokens == pytest.approx(
                second.prompt_tokens - first.prompt_tokens, abs=1
            )
            assert second.scheduled_s == first.done_s + 0.2


def test_a_closed_loop_never_has_more_requests_open_than_users() -> None:
    with stub_server("--ttft", "0.05", "--itl", "0.01") as fresh:
        stage = {"name": "users", "duration_s": 2, "arrivals": {"kind": "closed", "users": 5}}
        run = run_against(fresh, stage, client={"processes": 2})
        assert fresh.get("/log")["most_streams"] == 5
    assert {record.status for record in run.records} == {"ok"}
    assert len(run.records) > 25
    assert {record.process for record in run.records} == {0, 1}
    assert len({record.index for record in run.records}) == len(run.records)


def test_the_number_of_processes_changes_nothing_of_what_is_sent(stub: StubServer) -> None:
    def sent(run: Run) -> list[tuple[Any, ...]]:
        return [(one.index, one.scheduled_s, one.prompt_tokens, one.domain) for one in run.records]

    alone, shared = run_against(stub), run_against(stub, client={"processes": 2})
    assert sent(alone) == sent(shared)
    assert {record.process for record in shared.records} == {0, 1}


def test_repeats_draw_anew_and_stand_apart(stub: StubServer) -> None:
    run = run_against(stub, poisson(20, 1), repeats=2, pause_s=0)
    assert run.repeats == len(run.durations_s) == 2
    first, second = ({one.scheduled_s for one in run.records if one.repeat == number} for number in (0, 1))
    assert first and second and first.isdisjoint(second)


def test_a_client_that_misses_its_schedule_says_so(stub: StubServer) -> None:
    config = config_for(stub.url, poisson(20, 1), workload=SHORT, client={"max_lateness_ms": 0.0001})
    verdict = judge(execute_quietly(config), config)
    assert verdict.late and verdict.exit_code == 3


@pytest.mark.parametrize(("ttft_ms", "code"), [(5000, 0), (10, 4)])
def test_a_whole_run_as_a_user_makes_it(stub: StubServer, tmp_path: Path, ttft_ms: int, code: int) -> None:
    run = {
        "target": {"kind": "openai", "url": stub.url},
        "stages": [poisson(20, 2)],
        "workload": SHORT,
        "client": {"max_lateness_ms": 2000},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    out = tmp_path / "results"
    flags = [str(tmp_path / "run.yaml"), "--out", str(out), "--json", "--slo"]
    done = run_command(*flags, f"ttft:{ttft_ms}")
    assert done.returncode == code, done.stderr
    summary = json.loads(done.stdout)
    assert summary == json.loads((out / "summary.json").read_text()) | {"environment": summary["environment"]}
    assert summary["requests"]["by_status"] == {"ok": summary["requests"]["scheduled"]}
    assert {"config.yaml", "report.html", "requests.parquet", "series.parquet", "plots"} <= {
        path.name for path in out.iterdir()
    }
    again = run_command(*flags, "ttft:1000")
    assert again.returncode == 1
    assert again.stderr == f"expertmesh: {out}: is not empty; results need a directory of their own\n"


def test_ctrl_c_leaves_a_valid_partial_report(stub: StubServer, tmp_path: Path) -> None:
    run = {
        "target": {"kind": "openai", "url": stub.url},
        "stages": [{"name": "main", "duration_s": 300, "arrivals": {"kind": "poisson", "rate": 20}}],
        "workload": SHORT | {"output_tokens": {"kind": "fixed", "value": 200}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    command = [sys.executable, "-m", "expertmesh", "loadtest", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and sum(len(one["due"]) == 200 for one in stub.log().values()) < 80:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 130, stderr
    assert "interrupted" in stdout and "Traceback" not in stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["interrupted"] is True
    found = summary["requests"]["by_status"]
    assert found["ok"] > 5 and found["unfinished"] > 5 and set(found) == {"ok", "unfinished"}
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def greet_as_ssh(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection, _address = listener.accept()
        with connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            connection.recv(1024)


@pytest.mark.parametrize(
    ("url", "more", "said"),
    [
        ("http://127.0.0.1:{free}/v1", [], "/v1/models: connection refused"),
        ("http://127.0.0.1:{stub}/other", [], "/other/models: HTTP 404: no /other/models"),
        ("http://127.0.0.1:{stub}/v1", ["--model", "gpt"], "/v1/models: has no model 'gpt' (it has: stub)"),
        ("http://127.0.0.1:{ssh}/v1", [], "/v1/models: "),
        ("http://no.such.host.invalid/v1", [], "/v1/models: "),
    ],
)
def test_an_endpoint_that_refuses_or_speaks_something_else(
    stub: StubServer, tmp_path: Path, url: str, more: list[str], said: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=greet_as_ssh, args=(other,), daemon=True).start()
        given = url.format(free=free_port(), stub=stub.port, ssh=other.getsockname()[1])
        done = run_command("--url", given, "--rate", "5", "--out", str(tmp_path / "out"), *more)
    assert done.returncode == 1
    line = done.stderr.strip()
    assert line.startswith("expertmesh: ") and said in line and "\n" not in line, line
    assert not (tmp_path / "out").exists()
