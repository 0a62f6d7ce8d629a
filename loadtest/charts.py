"""The report's charts as Vega-Lite specifications; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtest import timeline
from loadtest.config import RunConfig
from loadtest.metrics import measured, values_of
from loadtest.records import ExpertRows, FaultRecord, Run
from loadtest.summary import latency_names
from loadtest.timeline import Row

Spec = dict[str, Any]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
CONFIG: Spec = {
    "title": {"anchor": "start", "fontSize": 14},
    "axis": {"titleFontWeight": "normal", "titleColor": "#555", "labelColor": "#333", "gridColor": "#e8eaee"},
    "view": {"stroke": "#e2e5ea"},
}
SHOWN = "shown"
"""Parameter of every chart over time: the repeat that it shows."""
STATUS_COLORS = {
    "ok": "#4c78a8",
    "cancelled": "#9d9d9d",
    "unfinished": "#bab0ac",
    "rejected": "#f58518",
    "refused": "#e45756",
    "disconnected": "#b279a2",
    "timeout": "#d67195",
    "server_error": "#a0322f",
    "bad_answer": "#72443a",
}
MIN_ENGINE_SAMPLES = 5
"""Of each repeat."""
LONG_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}


@dataclass(frozen=True)
class Chart:
    name: str
    """Of its PNG file, and its element in the page."""
    title: str
    caption: str
    spec: Spec
    over_time: bool = True


def all_charts(run: Run, config: RunConfig) -> list[Chart]:
    """In the order of the page; those without data are left out."""
    over_time = _OverTime(run)
    charts = [
        *_of_requests(run, config, over_time),
        *_of_groups(run, over_time),
        *_of_engines(run, over_time),
        *([heat_map(run.skew)] if any(one.rows for one in run.skew) else []),
    ]
    return [chart for chart in charts if chart is not None]


def _of_requests(run: Run, config: RunConfig, over_time: _OverTime) -> list[Chart | None]:
    rates, streams = timeline.rates(run), config.target.kind == "openai"
    requests = [row for row in rates if row["what"] != "tokens"]
    colors = {"due": "#9d9d9d", "answered": "#4c78a8", "failed": "#e45756"}
    tokens = [row for row in rates if row["what"] == "tokens"]
    open_ = timeline.open_requests(run)
    open_ = open_ if streams else [row | {"what": "open"} for row in open_ if "waiting" in row["what"]]
    what = "requests" if streams else "dispatches"
    return [
        over_time.lines("load", "Load", f"{what} per second", requests, colors=colors),
        over_time.areas("queue", "Open requests" if streams else "Open dispatches", what, open_),
        over_time.points(
            "latency", "Time to first token" if streams else "Time to answer", timeline.latencies(run, config)
        ),
        over_time.lines("tokens", "Output", "tokens per second", tokens, legend=False) if streams else None,
        distribution(run, config),
    ]


def _of_groups(run: Run, over_time: _OverTime) -> list[Chart | None]:
    def series(name: str) -> list[Row]:
        return timeline.sampled(run.samples, name)

    return [
        over_time.lines("replicas", "Replicas per group", "ready replicas", series("replicas"), step=True),
        over_time.lines("rows", "Rows per group", "rows per second", series("rows_per_s")),
        over_time.lines("busy", "Busy share per group", "mean over replicas", series("busy"), top=1),
        over_time.lines("group-queue", "Rows that wait, per group", "rows", series("queued_rows")),
    ]


def _of_engines(run: Run, over_time: _OverTime) -> list[Chart | None]:
    """Left out where they were read too seldom to show a course, as Ray's pages are in a short run."""
    queue = [
        row | {"what": word}
        for word in ("running", "waiting")
        for row in timeline.sampled(run.samples, f"engine_{word}")
    ]
    cache = timeline.sampled(run.samples, "engine_kv_cache")
    tokens = timeline.per_second(run.samples, "engine_generated_tokens")
    if len(cache) < MIN_ENGINE_SAMPLES * run.repeats and len(queue) < 2 * MIN_ENGINE_SAMPLES * run.repeats:
        return []
    return [
        over_time.lines("engine", "Engine's requests", "by the engine's own count", queue, step=True),
        over_time.lines("kv-cache", "KV cache in use", "share", cache, top=1, legend=False),
        over_time.lines("engine-tokens", "Engine's output", "tokens per second", tokens, legend=False),
    ]


class _OverTime:
    """Charts over the run's time, with its stages and faults marked."""

    def __init__(self, run: Run) -> None:
        self._repeats = run.repeats
        end_s = max((span.end_s for span in run.stages), default=1.0)
        ends = [end_s, *(record.done_s for record in run.records)]
        self._end_s = max(ends)
        self._marks = [_stage_marks(run)] if len(run.stages) > 1 else []
        self._marks += _fault_marks(run.faults) if run.faults else []

    def lines(
        self,
        name: str,
        title: str,
        y_title: str,
        rows: Sequence[Row],
        *,
        colors: dict[str, str] | None = None,
        step: bool = False,
        top: float | None = None,
        legend: bool = True,
    ) -> Chart | None:
        color = _color(colors, legend)
        y: Spec = {"field": "value", "type": "quantitative", "title": y_title}
        if rows:
            # of all repeats alike, so that they can be compared
            most = max(row["value"] for row in rows)
            y["scale"] = {"domain": [0, top or most or 1], "nice": top is None, "clamp": True}
        mark = {"type": "line", "interpolate": "step-after" if step else "linear", "strokeWidth": 1.8}
        return self._chart(name, title, rows, mark, {"y": y, "color": color})

    def areas(self, name: str, title: str, y_title: str, rows: Sequence[Row]) -> Chart | None:
        y = {"field": "value", "type": "quantitative", "title": y_title, "stack": True}
        return self._chart(name, title, rows, {"type": "area", "opacity": 0.75}, {"y": y, "color": _color(None, True)})

    def points(self, name: str, title: str, rows: Sequence[Row]) -> Chart | None:
        y = {"field": "ms", "type": "quantitative", "title": "ms, one point per request", "scale": {"type": "log"}}
        used = sorted({row["status"] for row in rows}, key=list(STATUS_COLORS).index)
        color = {
            "field": "status",
            "type": "nominal",
            "scale": {"domain": used, "range": [STATUS_COLORS[status] for status in used]},
            "legend": {"orient": "top", "title": None} if len(used) > 1 else None,
        }
        mark = {"type": "circle", "size": 14, "opacity": 0.5}
        return self._chart(name, title, rows, mark, {"y": y, "color": color})

    def _chart(self, name: str, title: str, rows: Sequence[Row], mark: Spec, encoding: Spec) -> Chart | None:
        if not rows:
            return None
        x = {
            "field": "at_s",
            "type": "quantitative",
            "title": "seconds of the run",
            "scale": {"domain": [0, self._end_s], "nice": False, "clamp": True},
            "axis": {"grid": False},
        }
        series = {"data": {"values": list(rows)}, "transform": [_of_shown()], "mark": mark}
        spec = {
            "$schema": SCHEMA,
            "config": CONFIG,
            "height": 190,
            "params": [{"name": SHOWN, "value": 0}],
            "layer": [*self._marks, series | {"encoding": {"x": x, **encoding}}],
        }
        return Chart(name, title, _caption(self._repeats), spec)


def distribution(run: Run, config: RunConfig) -> Chart | None:
    """Each latency's cumulative distribution, all repeats pooled, with the objectives."""
    values = values_of(measured(run.records, run.stages))
    rows = timeline.quantiles({LONG_NAMES[name]: values[name] for name in latency_names(config)})
    if not rows:
        return None
    limits = [{"figure": LONG_NAMES[name], "ms": ms} for name, ms in config.objectives.given.items()]
    used = [LONG_NAMES[name] for name in latency_names(config)]
    x = {"field": "ms", "type": "quantitative", "scale": {"type": "log"}, "title": "ms"}
    color = {"field": "figure", "type": "nominal", "sort": used, "legend": {"orient": "top", "title": None}}
    y = {"field": "share", "type": "quantitative", "title": "share of requests", "axis": {"format": "%"}}
    curves = {"data": {"values": rows}, "mark": {"type": "line", "strokeWidth": 2}, "encoding": {"y": y}}
    rules = {"data": {"values": limits}, "mark": {"type": "rule", "strokeDash": [5, 4]}}
    layer = [curves, rules] if limits else [curves]
    spec = {"$schema": SCHEMA, "config": CONFIG, "height": 190, "encoding": {"x": x, "color": color}, "layer": layer}
    caption = "dashed: the objectives" if limits else "all repeats"
    return Chart("distribution", "Latency distribution", caption, spec, over_time=False)


def heat_map(skew: Sequence[ExpertRows]) -> Chart:
    """Rows by layer and expert."""
    rows = [{"layer": one.layer, "expert": one.expert, "rows": one.rows} for one in skew]
    many = len({one.expert for one in skew}) > 40
    axis = {"labelOverlap": True, "labelAngle": 0, "ticks": False, "domain": False}
    color = {"field": "rows", "type": "quantitative", "scale": {"scheme": "yelloworangered", "domainMin": 0}}
    spec = {
        "$schema": SCHEMA,
        "config": CONFIG,
        "height": max(120, min(420, 22 * len({one.layer for one in skew}))),
        "data": {"values": rows},
        "mark": {"type": "rect", "tooltip": True, **({} if many else {"stroke": "white"})},
        "encoding": {
            "x": {"field": "expert", "type": "ordinal", "axis": axis},
            "y": {"field": "layer", "type": "ordinal", "axis": axis},
            "color": color | {"legend": {"format": "~s"}},
        },
    }
    return Chart("experts", "Rows by layer and expert", "during the run, all repeats", spec, over_time=False)


def _of_shown() -> Spec:
    return {"filter": f"datum.repeat == {SHOWN}"}


def _caption(repeats: int) -> str:
    return "the repeat chosen above" if repeats > 1 else ""


def _color(colors: dict[str, str] | None, legend: bool) -> Spec:
    color: Spec = {"field": "what", "type": "nominal"}
    if colors is not None:
        color["scale"] = {"domain": list(colors), "range": list(colors.values())}
    color["legend"] = {"orient": "top", "title": None} if legend else None
    return color


def _stage_marks(run: Run) -> Spec:
    """A dashed line where each stage begins, with its name."""
    values = [{"at_s": span.start_s, "stage": span.name} for span in run.stages]
    x = {"field": "at_s", "type": "quantitative"}
    rule = {"mark": {"type": "rule", "color": "#bbb", "strokeDash": [3, 3]}}
    text = {"type": "text", "align": "left", "dx": 4, "y": 6, "color": "#777", "fontSize": 10}
    name = {"mark": text, "encoding": {"text": {"field": "stage"}}}
    return {"data": {"values": values}, "encoding": {"x": x}, "layer": [rule, name]}


def _fault_marks(faults: Sequence[FaultRecord]) -> list[Spec]:
    """A red line, or a band where it lasts, with what was done."""
    values = [
        {
            "repeat": one.repeat,
            "at_s": one.at_s,
            "until_s": one.until_s if one.until_s is not None else one.at_s,
            "fault": one.kind.replace("_", " ") + (" (not done)" if one.error else ""),
            "target": one.target,
        }
        for one in faults
    ]
    x = {"field": "at_s", "type": "quantitative"}
    text = {"type": "text", "align": "left", "dx": 4, "y": 18, "color": "#c0392b", "fontSize": 10}
    shared: Spec = {"data": {"values": values}, "transform": [_of_shown()]}
    band = shared | {"mark": {"type": "rect", "color": "#e45756", "opacity": 0.15}}
    return [
        band | {"encoding": {"x": x, "x2": {"field": "until_s"}}},
        shared | {"mark": {"type": "rule", "color": "#c0392b", "tooltip": True}, "encoding": {"x": x}},
        shared | {"mark": text, "encoding": {"x": x, "text": {"field": "fault"}}},
    ]
