"""Grafana dashboards of the chart, from one line per panel."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

OF = 'namespace="$namespace", app_kubernetes_io_instance="$release"'
WIDTH, HEIGHT = 12, 8


@dataclass(frozen=True)
class Panel:
    title: str
    expression: str
    """PromQL; OF stands for the labels of the chosen release."""
    legend: str
    unit: str = "short"


SERVICE = (
    Panel(
        "Requests per second",
        "sum by (status_code) (rate(ray_serve_num_http_requests_total{OF}[1m]))"
        " or label_replace(sum(rate(ray_expertmesh_proxy_refusals_total{OF}[1m])),"
        ' "status_code", "429, at the proxy", "", "")',
        "{{status_code}}",
        "reqps",
    ),
    Panel(
        "Time to first token",
        "histogram_quantile(0.95, sum by (le) (rate(ray_vllm_time_to_first_token_seconds_bucket{OF}[1m])))",
        "p95",
        "s",
    ),
    Panel("Output tokens per second", "sum(rate(ray_vllm_generation_tokens_total{OF}[1m]))", "tokens/s"),
    Panel("Requests that run and wait", "sum(ray_vllm_num_requests_running{OF})", "running"),
    Panel("Ready replicas per group", 'max by (group) (ray_expertmesh_group_replicas{OF, state="ready"})', "{{group}}"),
    Panel("Replicas wanted per group", "max by (group) (ray_expertmesh_autoscaler_target_replicas{OF})", "{{group}}"),
    Panel("Ray nodes per pool", "max by (NodeType) (autoscaler_active_nodes{OF})", "{{NodeType}}"),
    Panel("Ray nodes pending", "max by (NodeType) (autoscaler_pending_nodes{OF})", "{{NodeType}}"),
)
EXPERTS = (
    Panel("Rows per second and group", "sum by (group) (rate(ray_expertmesh_replica_rows_total{OF}[1m]))", "{{group}}"),
    Panel(
        "Busy share, mean of a group",
        "avg by (group) (ray_expertmesh_replica_busy_ratio{OF})",
        "{{group}}",
        "percentunit",
    ),
    Panel("Rows that wait", "sum by (group) (ray_expertmesh_replica_queued_rows{OF})", "{{group}}"),
    Panel(
        "Wait in the queue, p95, worst replica",
        'max by (group) (ray_expertmesh_replica_queue_wait_seconds{OF, quantile="0.95"})',
        "{{group}}",
        "s",
    ),
    Panel(
        "Balancedness per layer (1: even)", "min by (layer) (ray_expertmesh_layer_balancedness{OF})", "layer {{layer}}"
    ),
    Panel(
        "Hottest experts, rows per second",
        "max by (rank) (ray_expertmesh_hot_expert_rows_per_second{OF})",
        "rank {{rank}}",
    ),
    Panel(
        "Since the autoscaler's last decision",
        "time() - max by (group) (ray_expertmesh_autoscaler_last_success_timestamp_seconds{OF})",
        "{{group}}",
        "s",
    ),
    Panel(
        "Replicas that a router gives no rows",
        "max by (group) (ray_expertmesh_router_suspended_replicas{OF})",
        "{{group}}",
    ),
    Panel(
        "Suspensions by routers, per minute",
        "60 * sum by (group, reason) (rate(ray_expertmesh_router_suspensions_total{OF}[5m]))",
        "{{group}} {{reason}}",
    ),
    Panel(
        "Busy share of each replica", "ray_expertmesh_replica_busy_ratio{OF}", "{{group}} {{replica}}", "percentunit"
    ),
)
DASHBOARDS = {
    "service": ("expertmesh: service", SERVICE),
    "experts": ("expertmesh: experts", EXPERTS),
}


def text(name: str) -> str:
    """The JSON of one dashboard."""
    title, panels = DASHBOARDS[name]
    dashboard = {
        "uid": f"expertmesh-{name}",
        "title": title,
        "tags": ["expertmesh"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }
    return json.dumps(dashboard, indent=1) + "\n"


def _variables() -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    namespace = _query("namespace", "label_values(ray_expertmesh_group_replicas, namespace)")
    release = _query(
        "release", 'label_values(ray_expertmesh_group_replicas{namespace="$namespace"}, app_kubernetes_io_instance)'
    )
    return [source, namespace, release]


def _query(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"uid": "${datasource}"},
        "query": query,
        "refresh": 2,
        "sort": 1,
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, 2)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [{"refId": "A", "expr": panel.expression.replace("OF", OF), "legendFormat": panel.legend}],
    }
