"""summary.json: all figures of a run, each per repeat and with its confidence; pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy

from loadtest.confidence import LEVEL, estimate
from loadtest.config import RunConfig
from loadtest.metrics import (
    FIGURES,
    Figures,
    figures,
    is_late,
    itl_s,
    lateness_p99_s,
    measured,
    measured_seconds,
    ttft_s,
)
from loadtest.records import INTENDED, ExpertRows, FaultRecord, RequestRecord, Run, Sample
from loadtest.skew import balancedness

SUMMARY_FILE = "summary.json"
FORMAT = 1
MAX_ERRORS = 20
AFTERMATH_S = 10.0
"""How long after a fault its costs are looked for."""
GROUP_SERIES = frozenset({"replicas", "rows_per_s", "busy", "queued_rows"})
EXPERT_FIGURES = ("e2e",)
"""An expert tier's dispatch has one answer, so nothing streams."""


def summarize(run: Run, config: RunConfig) -> dict[str, Any]:
    """Of the measured stages, unless it says otherwise; plain JSON values, times in ms or s as the names say."""
    counting = measured(run.records, run.stages)
    per_repeat = [_of_repeat(run, config, repeat, counting) for repeat in range(run.repeats)]
    late = is_late(counting, config.client.max_lateness_ms)
    return {
        "format": FORMAT,
        "name": config.name,
        "target": config.target.kind,
        "started_at": datetime.fromtimestamp(run.started_at, UTC).isoformat(timespec="seconds"),
        "repeats": run.repeats,
        "durations_s": [round(one, 3) for one in run.durations_s],
        "interrupted": run.interrupted,
        "valid": not late,
        "client": {
            "processes": run.client_processes,
            "lateness_ms_p99": 1000 * lateness_p99_s(counting),
            "max_lateness_ms": config.client.max_lateness_ms,
        },
        "confidence": LEVEL,
        "figures": join_repeats([named_figures(one, config) for one in per_repeat]),
        "requests": {
            "scheduled": len(run.records),
            "measured": len(counting),
            "by_status": dict(Counter(record.status for record in counting)),
        },
        "errors": errors_of(counting),
        "objectives": objectives_of(per_repeat, config),
        "stages": {span.name: _stage(run, config, span.name) for span in run.stages},
        "domains": _domains(counting, config),
        "experts": expert_figures(run.skew),
        "groups": group_figures(run.samples),
        "faults": [fault_figures(one, run) for one in run.faults],
        "notes": list(run.notes),
        "config": config.model_dump(mode="json"),
    }


def latency_names(config: RunConfig) -> tuple[str, ...]:
    return FIGURES if config.target.kind == "openai" else EXPERT_FIGURES


def named_figures(found: Figures, config: RunConfig) -> dict[str, float]:
    """Flat: `ttft_ms.p50` …, `output_rate`, `error_share`; what has no value is left out."""
    named = {
        "request_rate": found.request_rate,
        "output_rate": found.output_rate,
        "goodput": found.goodput,
        "good_share": found.good_share,
        "error_share": found.errors / found.requests if found.requests else 0.0,
    }
    for name in latency_names(config):
        spread = found.distributions[name]
        if spread is not None:
            named[f"{name}_ms.mean"] = 1000 * spread.mean
            named |= {f"{name}_ms.p{percent:g}": 1000 * value for percent, value in spread.percentiles.items()}
            named[f"{name}_ms.max"] = 1000 * spread.maximum
    return named


def join_repeats(repeats: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Each figure with its mean, bounds and values; over the repeats that have it."""
    joined = {}
    for name in dict.fromkeys(name for figures_ in repeats for name in figures_):
        found = estimate([figures_[name] for figures_ in repeats if name in figures_])
        joined[name] = {
            "value": found.value,
            "low": found.low,
            "high": found.high,
            "per_repeat": list(found.per_repeat),
        }
    return joined


def errors_of(records: Iterable[RequestRecord]) -> list[dict[str, Any]]:
    """By class and message, most frequent first; messages beyond the first MAX_ERRORS are counted together."""
    counts = Counter((record.status, record.error) for record in records if record.error)
    listed = [
        {"status": status, "message": message, "count": count}
        for (status, message), count in counts.most_common(MAX_ERRORS)
    ]
    others = counts.total() - sum(count for _, count in counts.most_common(MAX_ERRORS))
    return [*listed, {"status": "various", "message": "other messages", "count": others}] if others else listed


def objectives_of(per_repeat: list[Figures], config: RunConfig) -> dict[str, Any] | None:
    """None where the run has none."""
    if not config.objectives.given:
        return None
    good, due = sum(one.good for one in per_repeat), sum(one.due for one in per_repeat)
    share = good / due if due else 1.0
    limits = {f"{name}_ms": limit for name, limit in config.objectives.given.items()}
    return {**limits, "share": config.objectives.share, "good_share": share, "met": share >= config.objectives.share}


def expert_figures(skew: Iterable[ExpertRows]) -> dict[str, Any] | None:
    """Per layer its rows, its balancedness (mean over largest) and its hottest expert; None without rows."""
    layers: dict[int, dict[int, int]] = defaultdict(dict)
    for one in skew:
        layers[one.layer][one.expert] = one.rows
    if not any(rows for experts in layers.values() for rows in experts.values()):
        return None
    return {str(layer): _layer(experts) for layer, experts in sorted(layers.items())}


def group_figures(samples: Iterable[Sample]) -> dict[str, dict[str, float]]:
    """Group -> extremes and means of what the directory said of it while the run went on."""
    series: dict[tuple[str, str], list[float]] = defaultdict(list)
    for one in samples:
        if one.name in GROUP_SERIES:
            series[one.label, one.name].append(one.value)
    return {
        group: {
            "replicas_min": min(series[group, "replicas"]),
            "replicas_max": max(series[group, "replicas"]),
            "rows_per_s_mean": float(numpy.mean(series[group, "rows_per_s"])),
            "busy_mean": float(numpy.mean(series[group, "busy"])),
            "busy_max": max(series[group, "busy"]),
            "queued_rows_max": max(series[group, "queued_rows"]),
        }
        for group in sorted({group for group, _ in series})
    }


def fault_figures(fault: FaultRecord, run: Run) -> dict[str, Any]:
    """What was done, and what befell the requests that were open during it or within AFTERMATH_S."""
    end_s = (fault.until_s if fault.until_s is not None else fault.at_s) + AFTERMATH_S
    touched = [
        record
        for record in run.records
        if record.repeat == fault.repeat and record.scheduled_s <= end_s and record.done_s >= fault.at_s
    ]
    gaps = [float(gap) for record in touched for gap in itl_s(record)]
    firsts = [ttft_s(record) for record in touched if record.token_times]
    failed = sum(record.status not in (*INTENDED, "unfinished") for record in touched)
    return {
        "repeat": fault.repeat,
        "at_s": fault.at_s,
        "until_s": fault.until_s,
        "kind": fault.kind,
        "target": fault.target,
        "error": fault.error,
        "requests": len(touched),
        "failed": failed,
        "slowest_first_token_ms": 1000 * max(firsts) if firsts else None,
        "longest_gap_ms": 1000 * max(gaps) if gaps else None,
    }


def _layer(experts: Mapping[int, int]) -> dict[str, Any]:
    total = sum(experts.values())
    hottest = max(experts, key=lambda expert: (experts[expert], -expert))
    return {
        "rows": total,
        "balancedness": balancedness(numpy.array(list(experts.values()), dtype=float)),
        "hottest": hottest,
        "hottest_share": experts[hottest] / total if total else 0.0,
    }


def _of_repeat(run: Run, config: RunConfig, repeat: int, counting: list[RequestRecord]) -> Figures:
    records = [record for record in counting if record.repeat == repeat]
    return figures(records, max(measured_seconds(records, run.stages), 1e-9), config.objectives)


def _stage(run: Run, config: RunConfig, name: str) -> dict[str, Any]:
    """Of one stage, its requests alone, over its span."""
    (span,) = [span for span in run.stages if span.name == name]
    of_repeats = []
    for repeat in range(run.repeats):
        records = [record for record in run.records if record.stage == name and record.repeat == repeat]
        found = figures(records, max(span.end_s - span.start_s, 1e-9), config.objectives)
        of_repeats.append(named_figures(found, config) | {"due_rate": found.requests / found.seconds})
    values = {name: one["value"] for name, one in join_repeats(of_repeats).items()}
    return {"start_s": span.start_s, "end_s": span.end_s, "measured": span.measured, "figures": values}


def _domains(records: list[RequestRecord], config: RunConfig) -> dict[str, Any]:
    """Requests and figures per domain, where there is more than one."""
    names = sorted({record.domain for record in records})
    if len(names) < 2:
        return {}
    found = {}
    for name in names:
        own = [record for record in records if record.domain == name]
        figures_ = named_figures(figures(own, 1.0, config.objectives), config)
        found[name] = {"requests": len(own)} | {key: value for key, value in figures_.items() if "_rate" not in key}
        del found[name]["goodput"]
    return found
