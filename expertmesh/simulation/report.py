"""A simulation as files: summary.json, scenario.yaml, series.csv, day.png and, where asked for, report.html."""

from __future__ import annotations

import csv
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
import yaml

from expertmesh.simulation.charts import day
from expertmesh.simulation.lane import CLASSES, Sample
from expertmesh.simulation.results import ROWS, caption
from expertmesh.simulation.run import Simulated

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ summary.name }}</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .7em; text-align: right; border-bottom: 1px solid #e2e5ea }
td:first-child, th:first-child { text-align: left } pre { background: #f6f7f9; padding: 1em; overflow: auto }
</style>
<h1>{{ summary.name }}</h1>
<p>{{ caption }}</p>
<table><tr><th></th>{% for name in summary.strategies %}<th>{{ name }}</th>{% endfor %}</tr>
{% for key, title, form in rows %}<tr><td>{{ title }}</td>
{% for found in summary.strategies.values() %}<td>{{ form.format(found[key]) }}</td>{% endfor %}</tr>
{% endfor %}<tr><td>groups save, replica-seconds</td>{% for name in summary.strategies %}<td>
{% if name in summary.saved_by_groups %}{{ '{:.1%}'.format(summary.saved_by_groups[name].replica_seconds) }}{% endif %}
</td>{% endfor %}</tr></table>
<p>{{ picture | safe }}</p>
<details><summary>scenario</summary><pre>{{ scenario }}</pre></details>
</html>
"""


def write_results(directory: Path, found: Simulated, summary: dict[str, Any], page: bool) -> list[Path]:
    """The summary is written last, so that a directory with a summary holds the rest."""
    spec = day(found)
    scenario = yaml.safe_dump(found.scenario.model_dump(mode="json", exclude_none=True), sort_keys=False)
    files = {
        "scenario.yaml": scenario.encode(),
        "day.png": vl_convert.vegalite_to_png(spec, scale=1.5),
    }
    if page:
        picture = vl_convert.vegalite_to_svg(spec)
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        text = environment.from_string(PAGE).render(
            summary=summary, caption=caption(summary), rows=ROWS, picture=picture, scenario=scenario
        )
        files["report.html"] = text.encode()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    write_series(directory / "series.csv", found)
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return [directory / name for name in (*files, "series.csv", "summary.json")]


def write_series(path: Path, found: Simulated) -> None:
    """One row per strategy and sample."""
    plain = [one.name for one in fields(Sample) if one.name != "classes"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*plain, *(f"running, {name}" for name, _ in CLASSES)])
        for sample in found.samples:
            writer.writerow([*(getattr(sample, name) for name in plain), *sample.classes])
