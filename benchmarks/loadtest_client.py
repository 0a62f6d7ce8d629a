"""What one client process of `expertmesh loadtest` bears, against a stub server on the same machine."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from benchmarks.stub import stub_server
from loadtest import metrics
from loadtest.config import RunConfig
from loadtest.run import execute

MEASURED_S = 20.0


@dataclass(frozen=True)
class Case:
    rate: float
    """New requests per second, Poisson."""
    tokens: int
    itl_s: float
    warm_s: float
    """Until as many streams are open as will be."""


CASES = {"500_streams": Case(rate=50, tokens=200, itl_s=0.05, warm_s=12), "200_per_s": Case(200, 64, 0.02, 3)}


def run(_cluster: str | None) -> dict[str, object]:
    """Per case; the issue asks for a lateness p99 below 20 ms."""
    found = {name: measure(case) for name, case in CASES.items()}
    return {figure: {name: values[figure] for name, values in found.items()} for figure in found["200_per_s"]}


def measure(case: Case) -> dict[str, float]:
    """Of the time after the warm-up."""
    arrivals = {"kind": "poisson", "rate": case.rate}
    stages = [
        {"name": "warm", "duration_s": case.warm_s, "arrivals": arrivals, "measured": False},
        {"name": "main", "duration_s": MEASURED_S, "arrivals": arrivals},
    ]
    with stub_server("--ttft", "0.2", "--itl", str(case.itl_s)) as stub:
        workload = {"output_tokens": {"kind": "fixed", "value": case.tokens}}
        target = {"kind": "openai", "url": f"{stub.url}/v1"}
        config = RunConfig.model_validate({"target": target, "stages": stages, "workload": workload})
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = execute(config, Console(quiet=True))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        most_streams = stub.log()["most_streams"]
    records = metrics.measured(found.records, found.stages)
    values = metrics.values_of(records)
    late_ms = 1000 * values["lateness"]
    # the client process has ended and been reaped; the stub has not
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "lateness_p50_ms": round(float(np.percentile(late_ms, 50)), 2),
        "lateness_p99_ms": round(float(np.percentile(late_ms, 99)), 2),
        "lateness_max_ms": round(float(late_ms.max()), 2),
        "loop_lag_max_ms": round(1000 * max(one.value for one in found.samples if one.name == "client_loop_lag_s"), 1),
        "most_streams": most_streams,
        "requests_per_s": round(len(records) / MEASURED_S, 1),
        "events_per_s": round(case.tokens * len(records) / MEASURED_S),
        "client_cores": round(cpu_s / found.durations_s[0], 3),
        "ttft_p50_ms": round(float(1000 * np.median(values["ttft"])), 2),
        "itl_p50_ms": round(float(1000 * np.median(values["itl"])), 2),
        "injected_ttft_ms": 200.0,
        "injected_itl_ms": 1000 * case.itl_s,
        "errors": sum(record.status != "ok" for record in records),
    }
