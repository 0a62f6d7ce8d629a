"""report.html: one page that holds all it needs, charts drawn by Vega-Lite in the browser."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import vl_convert
import yaml

from loadtest.charts import LONG_NAMES, SHOWN, Chart
from loadtest.tables import Names, Summary, number, plus_minus, tables

TEMPLATE = Path(__file__).with_name("page.html.j2")
DEFINITIONS = (
    "Definitions as in vLLM's bench serve, but counted from when a request was due: TTFT, to its first token; ITL, the "
    "gaps between tokens, pooled; TPOT, (E2E - TTFT) / (output tokens - 1); E2E, to its last token. Latencies are of "
    "requests answered in full. Goodput counts requests per second that meet every objective. ± is half of the 95 % "
    "confidence interval over the repeats (Student's t)."
)
TILES = (("ttft", "p50"), ("ttft", "p99"), ("tpot", "p50"), ("itl", "p99"))
EXPERT_TILES = (("e2e", "p50"), ("e2e", "p99"))


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    kind: str
    text: str


def render(summary: Summary, charts: Sequence[Chart]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    specs = {chart.name: chart.spec | {"width": "container"} for chart in charts}
    names = Names.of(summary)
    return environment.from_string(TEMPLATE.read_text()).render(
        name=summary["name"],
        subtitle=subtitle(summary),
        verdicts=verdicts(summary, names),
        tiles=tiles(summary, names),
        tables=tables(summary, names),
        charts=charts,
        repeats=summary["repeats"],
        notes=summary["notes"],
        definitions=DEFINITIONS,
        config=yaml.safe_dump(summary["config"], sort_keys=False),
        environment=yaml.safe_dump(summary["environment"], sort_keys=False),
        library=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script"),
        specs=json.dumps(specs).replace("</", "<\\/"),
        shown=SHOWN,
    )


def subtitle(summary: Summary) -> str:
    target = summary["config"]["target"]
    where = target.get("url") or target.get("directory") or f"cluster {target['cluster']}"
    repeats = f"{summary['repeats']} repeats" if summary["repeats"] > 1 else "one repeat"
    return f"{where} · {summary['started_at']} · {repeats}, {sum(summary['durations_s']):.0f} s in all"


def verdicts(summary: Summary, names: Names) -> list[Verdict]:
    """What a reader must know first."""
    found = []
    client = summary["client"]
    if not summary["valid"]:
        late = f"{client['lateness_ms_p99']:.0f} ms late at p99, {client['max_lateness_ms']:g} ms allowed"
        found.append(Verdict("bad", f"invalid: the client was {late}; give it more processes or cores"))
    if summary["interrupted"]:
        found.append(Verdict("warn", "interrupted: figures are of what ran until then"))
    failed = sum(entry["count"] for entry in summary["errors"])
    counted = summary["requests"]["measured"]
    found.append(Verdict("bad" if failed else "good", f"{failed} of {counted} {names.requests} failed"))
    objectives = summary["objectives"]
    if objectives is not None:
        share = f"{objectives['good_share']:.1%} good, {objectives['share']:.0%} wanted"
        met = objectives["met"]
        found.append(Verdict("good" if met else "bad", f"objectives {'met' if met else 'missed'}: {share}"))
    if summary["valid"]:
        found.append(Verdict("good", f"the client kept its schedule: {client['lateness_ms_p99']:.1f} ms late at p99"))
    return found


def tiles(summary: Summary, names: Names) -> list[Tile]:
    figures = summary["figures"]

    def tile(label: str, figure: str, unit: str, scale: float = 1.0) -> Tile:
        found = figures.get(figure)
        if found is None:
            return Tile(label, "-", unit)
        return Tile(label, number(scale * found["value"]), unit, plus_minus(found, scale))

    chosen = TILES if summary["target"] == "openai" else EXPERT_TILES
    latencies = [tile(f"{LONG_NAMES[name]} {percent}", f"{name}_ms.{percent}", "ms") for name, percent in chosen]
    rates = [
        tile("answered", "request_rate", f"{names.requests}/s"),
        tile("output", "output_rate", f"{names.tokens}/s"),
        tile("goodput", "goodput", f"{names.requests}/s"),
    ]
    return [*(rates if summary["objectives"] is not None else rates[:2]), *latencies]
