"""A day as pictures: Vega-Lite specifications of replicas against load; pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from expertmesh.simulation.lane import CLASSES, Sample
from expertmesh.simulation.run import Simulated
from expertmesh.simulation.scenario import StrategyName
from loadtest.charts import CONFIG, SCHEMA

Spec = dict[str, Any]
WIDTH, HEIGHT = 760, 170
STRATEGIES: tuple[str, ...] = get_args(StrategyName)
COLORS = ("#4c78a8", "#72b7b2", "#f58518", "#e45756", "#9d9d9d")
"""Of strategies and classes, in their order."""
LEAST_WAIT_MS = 1e-3


def day(found: Simulated) -> Spec:
    """Load, replicas of each strategy, of ours by the load of their groups, and waits, above one another."""
    hours = found.scenario.ticks * found.scenario.policy.tick_s / 3600
    scale = {"domain": [0, hours], "nice": False}
    x = {"field": "h", "type": "quantitative", "title": "hours", "scale": scale, "axis": {"grid": False}}
    first = found.courses[0].name
    load = [{"h": one.at_s / 3600, "y": one.tokens_per_s} for one in found.samples if one.strategy == first]
    charts = [
        _chart("Load", "tokens per second", load, "area", x, None),
        _chart("Replicas that hold a GPU", "replicas", _rows(found.samples, "replicas"), "line", x, "strategy"),
    ]
    ours = [one for one in found.samples if one.strategy == "groups"]
    if ours:
        rows = [
            {"h": one.at_s / 3600, "y": count, "what": name, "order": order}
            for one in ours
            for order, ((name, _), count) in enumerate(zip(CLASSES, one.classes, strict=True))
        ]
        charts.append(_chart("Replicas by the load of their groups, scaled alone", "running", rows, "area", x, "what"))
    waits = [row for row in _rows(found.samples, "p95_wait_ms") if row["y"] >= LEAST_WAIT_MS]
    if waits:
        chart = _chart("Queue wait, p95 of a group, mean over rows", "ms", waits, "line", x, "strategy")
        chart["encoding"]["y"] |= {"scale": {"type": "log"}, "axis": {"format": "g", "tickCount": 5}}
        charts.append(chart)
    title = f"{found.scenario.name}: {len(found.layout.groups):,} groups, simulated"
    return {
        "$schema": SCHEMA,
        "config": CONFIG,
        "background": "white",
        "title": title,
        "vconcat": charts,
        "resolve": {"scale": {"color": "independent"}},
    }


def _rows(samples: Sequence[Sample], name: str) -> list[Spec]:
    return [{"h": one.at_s / 3600, "y": getattr(one, name), "strategy": one.strategy} for one in samples]


def _chart(title: str, y_title: str, rows: list[Spec], mark: str, x: Spec, color: str | None) -> Spec:
    encoding: Spec = {"x": x, "y": {"field": "y", "type": "quantitative", "title": y_title, "axis": {"format": "~s"}}}
    if color is not None:
        sort = [name for name, _ in CLASSES] if color == "what" else list(STRATEGIES)
        legend = {"orient": "top", "title": None}
        used = [name for name in sort if any(row[color] == name for row in rows)]
        colors = [COLORS[sort.index(name)] for name in used]
        scale = {"domain": used, "range": colors}
        encoding["color"] = {"field": color, "type": "nominal", "legend": legend, "scale": scale}
    if mark == "area" and color is not None:
        encoding["order"] = {"field": "order"}
    shape = {"type": mark, "opacity": 0.8} if mark == "area" else {"type": mark, "strokeWidth": 1.5}
    return {
        "title": title,
        "width": WIDTH,
        "height": HEIGHT,
        "data": {"values": rows},
        "mark": shape,
        "encoding": encoding,
    }
