"""The search for the highest rate ends at the knee, by pure reasoning and against a server of known capacity."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stub import config_for, poisson, run_command, stub_server

from expertmesh.errors import ConfigError
from loadtest.capacity import Outcome, at_rate, is_saturated, search
from loadtest.config import OpenArrivals
from loadtest.flags import Flags, make_config
from loadtest.records import RequestRecord, StageSpan

SPAN = StageSpan("main", 0, 20, True)


def tried(capacity: float, start: float, tolerance: float = 0.03) -> list[tuple[float, Outcome]]:
    found: list[tuple[float, Outcome]] = []

    def attempt(rate: float) -> Outcome:
        found.append((rate, "met" if rate <= capacity else "missed"))
        return found[-1][1]

    search(attempt, start, tolerance)
    return found


@given(st.floats(0.1, 5000), st.floats(1, 100))
def test_the_knee_is_found_within_the_tolerance(capacity: float, start: float) -> None:
    found = tried(capacity, start)
    best = max(rate for rate, outcome in found if outcome == "met")
    assert best <= capacity < best * 1.03 * 1.001
    assert len(found) <= 10 + abs(math.log2(capacity / start)) + 1


def test_rates_double_then_bisect() -> None:
    assert [rate for rate, _ in tried(50, 10, 0.1)] == [10, 20, 40, 80, 60, 50, 55]


def test_a_server_that_meets_nothing_ends_the_search() -> None:
    assert len(tried(0, 10)) == 11


def test_the_search_ends_where_the_client_gives_way() -> None:
    rates: list[float] = []

    def attempt(rate: float) -> Outcome:
        rates.append(rate)
        return "late client" if rate > 30 else "met"

    search(attempt, 10, 0.03)
    assert rates == [10, 20, 40]


def queued(rate: float, capacity: float, seed: int = 0) -> list[RequestRecord]:
    """Poisson arrivals for 20 s at a server that begins `capacity` answers per second, one after another."""
    generator = np.random.default_rng(seed)
    arrived = np.cumsum(generator.standard_exponential(int(rate * 20))) / rate
    free, records = 0.0, []
    for at in arrived[arrived < 20].tolist():
        free = max(free, at) + 1 / capacity
        records.append(RequestRecord(0, "main", 0, 0, "", at, at, (free, free + 1), free + 1, 1, 2, "ok"))
    return records


@pytest.mark.parametrize("seed", range(5))
def test_a_queue_that_grows_is_saturation_and_one_that_does_not_is_none(seed: int) -> None:
    assert is_saturated(queued(60, 40, seed), SPAN)
    assert not is_saturated(queued(36, 40, seed), SPAN)
    assert not is_saturated(queued(5, 40, seed), SPAN)


def test_measured_stages_are_scaled_and_warm_up_is_left_alone() -> None:
    warm = poisson(3, 5) | {"name": "warm", "measured": False}
    scaled = at_rate(config_for("http://h/v1", warm, poisson(10, 5, to_rate=20)), 40)
    arrivals = [stage.arrivals for stage in scaled.stages]
    assert [(one.rate, one.to_rate) for one in arrivals if isinstance(one, OpenArrivals)] == [(3, None), (40, 80)]


def test_a_known_capacity_is_found_within_five_percent(tmp_path: Path) -> None:
    """4 slots of 40 ms each: 100 requests per second."""
    with stub_server("--ttft", "0.02", "--itl", "0.001", "--slots", "4") as stub:
        run = {
            "target": {"kind": "openai", "url": stub.url},
            "stages": [{"name": "main", "duration_s": 4, "arrivals": {"kind": "constant", "rate": 40}}],
            "workload": {"output_tokens": {"kind": "fixed", "value": 21}},
            "objectives": {"ttft_ms": 100},
            "pause_s": 0.1,
            "client": {"max_lateness_ms": 80},
        }
        (tmp_path / "run.yaml").write_text(json.dumps(run))
        out = tmp_path / "out"
        done = run_command(str(tmp_path / "run.yaml"), "--find-max-rate", "--out", str(out), timeout_s=240)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "capacity.json").read_text())
    assert found["max_rate"] == pytest.approx(100, rel=0.05)
    outcomes = {trial["rate"]: trial["outcome"] for trial in found["trials"]}
    assert outcomes[40] == outcomes[80] == "met"
    assert outcomes[160] in {"missed", "saturated"}
    assert "knee: " in done.stdout and "160" in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (Flags(url="http://127.0.0.1:1/v1", rate=5), "objectives: a search needs one"),
        (
            Flags(url="http://127.0.0.1:1/v1", users=5, slo=("ttft:5",)),
            "stages: main: a search needs arrivals with a rate",
        ),
    ],
)
def test_what_cannot_be_searched(flags: Flags, said: str) -> None:
    from rich.console import Console

    from loadtest.capacity import CapacitySearch

    with pytest.raises(ConfigError, match=said):
        CapacitySearch(make_config(None, flags), Console(quiet=True))
