"""Figures for Prometheus, through the metrics agent that Ray has on every node; without Ray they go nowhere.

The agent puts `ray_` before each name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One name; its series differ in their labels, whose values must be few."""

    name: str
    kind: Literal["gauge", "counter"]
    labels: tuple[str, ...]
    meaning: str


class Exporter:
    """Hands values to Ray where this process has joined one."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    @property
    def wanted(self) -> bool:
        ray = sys.modules.get("ray")
        return ray is not None and bool(ray.is_initialized())

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """A gauge's value, for its labels in their order."""
        self._get(metric).set(value, tags=dict(zip(metric.labels, labels, strict=True)))

    def add(self, metric: Metric, value: float, *labels: str) -> None:
        """What a counter grew by; nothing happens where that is nothing."""
        if value > 0:
            self._get(metric).inc(value, tags=dict(zip(metric.labels, labels, strict=True)))

    def _get(self, metric: Metric) -> Any:
        if metric.name not in self._made:
            from ray.util import metrics

            kind = metrics.Gauge if metric.kind == "gauge" else metrics.Counter
            self._made[metric.name] = kind(metric.name, metric.meaning, metric.labels)
        return self._made[metric.name]
