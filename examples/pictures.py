"""The pictures of docs/scaling.md.

python -m examples.pictures replicas RESULT.json docs/images/replicas.svg   # what `benchmarks hot_experts` wrote
python -m examples.pictures experts 127.0.0.1:9000 docs/images/experts.svg  # a running cluster's directory
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import vl_convert

from expertmesh.directory.client import expert_load
from expertmesh.errors import ClusterError, ExpertMeshError
from loadtest.charts import CONFIG, SCHEMA, heat_map
from loadtest.records import ExpertRows

Spec = dict[str, Any]
TITLES = {"per_group": "Each group scales by its own load", "uniform": "All groups scale together"}


def replicas(result: dict[str, Any]) -> Spec:
    """Of each run of `hot_experts`: the load, the replicas of each group above it, and the time per output token."""
    charts: list[Spec] = []
    most = max(sum(row) for one in result["series"].values() for row in zip(*one["replicas"].values(), strict=True))
    times = [ms for one in result["series"].values() for ms in one["p95_ms"]]
    slowest = {"type": "log", "domain": [min(times), max(times)]}
    end_s = max(one["held_s"][-1] for one in result["series"].values())
    for name, seen in result["series"].items():
        held = [
            {"s": at, "replicas": count, "group": group}
            for group, counts in seen["replicas"].items()
            for at, count in zip(seen["held_s"], counts, strict=True)
        ]
        load = [{"s": at, "y": rate} for at, rate in zip(seen["window_s"], seen["token_steps_per_s"], strict=True)]
        p95 = [{"s": at, "y": ms} for at, ms in zip(seen["window_s"], seen["p95_ms"], strict=True)]
        charts += [
            _chart(TITLES[name], "replicas", held, "area", ("replicas", {"domain": [0, most]}), "group"),
            _chart("Load", "token steps per second", load, "line", ("y", {"zero": True}), None),
            _chart("Time per output token, p95", "ms", p95, "line", ("y", slowest), None),
        ]
    for chart in charts:
        chart["encoding"]["x"]["scale"] = {"domain": [0, end_s], "nice": False}
    half = len(charts) // 2
    columns = [{"vconcat": charts[:half]}, {"vconcat": charts[half:]}]
    title = f"Load steps up, then popularity moves; {result['device']}"
    return {"$schema": SCHEMA, "config": CONFIG, "background": "white", "title": title, "hconcat": columns}


def _chart(title: str, unit: str, rows: list[Spec], mark: str, y: tuple[str, Spec], color: str | None) -> Spec:
    encoding: Spec = {
        "x": {"field": "s", "type": "quantitative", "title": "seconds"},
        "y": {"field": y[0], "type": "quantitative", "title": unit, "scale": y[1]},
    }
    if color is not None:
        encoding["color"] = {"field": color, "type": "nominal"}
    shape = {"type": mark, "interpolate": "step-after"} if mark == "area" else {"type": mark, "point": True}
    size = {"width": 340, "height": 150 if mark == "area" else 90}
    return {"title": title, **size, "data": {"values": rows}, "mark": shape, "encoding": encoding}


def experts(directory: str) -> Spec:
    """Rows by layer and expert since the replicas began; raises ClusterError where there are none."""
    found = expert_load(directory, 0)
    rows = [
        ExpertRows(layer.layer, expert, count)
        for layer in found.layers
        for expert, count in zip(layer.experts, layer.rows, strict=True)
    ]
    if not any(one.rows for one in rows):
        raise ClusterError(f"directory at {directory}: no expert has had a row yet")
    return heat_map(rows).spec | {"background": "white", "width": 480, "title": "Rows by layer and expert"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=("replicas", "experts"))
    parser.add_argument("source", help="a result's file, or host:port of a directory")
    parser.add_argument("target", type=Path, help="the SVG file")
    given = parser.parse_args()
    try:
        spec = (
            replicas(json.loads(Path(given.source).read_text())) if given.which == "replicas" else experts(given.source)
        )
    except (ExpertMeshError, OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"pictures: {given.source}: {error}")
    given.target.parent.mkdir(parents=True, exist_ok=True)
    given.target.write_text(vl_convert.vegalite_to_svg(spec) + "\n")


if __name__ == "__main__":
    main()
