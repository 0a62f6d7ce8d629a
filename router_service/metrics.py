"""What the router's front end tells Prometheus."""

from __future__ import annotations

from expertmesh.metrics import Metric

DEGRADED_RESPONSES = Metric(
    "expertmesh_router_degraded_responses_total",
    "counter",
    (),
    "Responses that went on without an expert, since the router began; only with `engine.degrade_after_s`.",
)
ROUTER_METRICS = (DEGRADED_RESPONSES,)
