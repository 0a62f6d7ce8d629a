"""The result directory, and the page in a real browser."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_runs import made_config, made_run
from pyarrow import parquet

from loadtest.config import load_run
from loadtest.records import Run
from loadtest.report import write_results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("results") / "made", made_run(), made_config()).parent


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH (Debian: chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that is offline; what it complains of is in `page.trouble`, what it asks for in `page.asked`."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.trouble, page.asked = [], []
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("console", lambda message: message.type in ("error", "warning") and page.trouble.append(message.text))
    page.on("request", lambda request: page.asked.append(request.url))
    yield page
    context.close()


def show(page: Any, report: Path) -> None:
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=60_000)


def test_every_file_is_written(results: Path) -> None:
    assert {path.name for path in results.iterdir()} == {
        "config.yaml",
        "plots",
        "report.html",
        "requests.parquet",
        "series.parquet",
        "summary.json",
    }
    assert load_run(results / "config.yaml") == made_config()
    summary = json.loads((results / "summary.json").read_text())
    assert summary["environment"]["versions"]["expertmesh"]


def test_requests_and_series_are_complete(results: Path) -> None:
    run = made_run()
    requests, series = parquet.read_table(results / "requests.parquet"), parquet.read_table(results / "series.parquet")
    assert requests.num_rows == len(run.records) and series.num_rows == len(run.samples)
    first = requests.slice(0, 1).to_pylist()[0]
    assert tuple(first["token_times"]) == run.records[0].token_times
    assert first["status"] == run.records[0].status and first["scheduled_s"] == run.records[0].scheduled_s


def test_plots_are_pictures(results: Path) -> None:
    plots = {path.stem: path.read_bytes() for path in (results / "plots").iterdir()}
    assert {"load", "queue", "latency", "distribution", "replicas", "busy", "experts", "engine"} <= plots.keys()
    for picture in plots.values():
        assert picture.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", picture[16:24])
        assert width > 1000 and height > 300


def test_the_page_holds_all_it_needs(results: Path, page: Any) -> None:
    report = results / "report.html"
    show(page, report)
    assert page.trouble == []
    assert page.asked == [report.as_uri()]
    assert report.stat().st_size < 2 * 2**20


def test_the_page_shows_the_run(results: Path, page: Any) -> None:
    show(page, results / "report.html")
    assert page.title() == "made · load test"
    plots = {path.stem for path in (results / "plots").iterdir()}
    drawn = page.eval_on_selector_all(".plot svg", "all => all.map(one => one.parentElement.closest('.plot').id)")
    assert {f"chart-{name}" for name in plots} == set(drawn)
    widths = page.eval_on_selector_all(".plot svg", "all => all.map(one => one.getBoundingClientRect().width)")
    assert min(widths) > 300
    assert "HTTP 500: <b>no & luck</b>" in page.inner_text("#table-errors")
    assert (
        page.locator("#chart-experts path[aria-roledescription='rect mark'], #chart-experts .mark-rect path").count()
        >= 64
    )
    assert "hang" in page.inner_text("#table-faults") and "hang" in page.text_content("#chart-load svg")
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0


def test_another_repeat_can_be_chosen(results: Path, page: Any) -> None:
    show(page, results / "report.html")
    line = "document.querySelector('#chart-load .mark-line path').getAttribute('d')"
    first = page.evaluate(line)
    page.select_option("#repeat", "2")
    page.wait_for_function(f"{line} !== {json.dumps(first)}", timeout=10_000)
    fixed = page.inner_text("#table-latency")
    page.select_option("#repeat", "0")
    page.wait_for_function(f"{line} === {json.dumps(first)}", timeout=10_000)
    assert page.inner_text("#table-latency") == fixed


def nothing_answered(run: Run) -> Run:
    return replace(
        run, records=tuple(replace(one, status="refused", token_times=(), error="no") for one in run.records)
    )


def nothing_sent(run: Run) -> Run:
    return replace(run, records=(), samples=(), faults=(), skew=(), interrupted=True)


@pytest.mark.parametrize(("change", "said"), [(nothing_answered, "requests failed"), (nothing_sent, "interrupted")])
def test_poor_runs_have_a_page_too(tmp_path: Path, page: Any, change: Any, said: str) -> None:
    report = write_results(tmp_path / "poor", change(made_run(1)), made_config(repeats=1))
    show(page, report)
    assert page.trouble == []
    assert said in page.inner_text(".verdicts")


def test_text_from_servers_cannot_become_markup(tmp_path: Path, page: Any) -> None:
    evil = "</script><script>window.broken = 1</script>"
    run = made_run(1)
    records = tuple(replace(one, status="server_error", token_times=(), error=evil, domain=evil) for one in run.records)
    report = write_results(tmp_path / "evil", replace(run, records=records), made_config())
    show(page, report)
    assert page.evaluate("window.broken") is None and page.trouble == []
    assert evil in page.inner_text("#table-errors")


def test_the_config_is_shown_as_it_was(results: Path, page: Any) -> None:
    show(page, results / "report.html")
    assert yaml.safe_load(page.text_content("#config"))["seed"] == 0
