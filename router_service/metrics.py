"""What a router tells Prometheus, from its front end: the engine's process has not joined Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from expertmesh.metrics import Exporter, Metric
from router_service.replicas import Suspensions

EVERY_S = 2.0
SUSPENSIONS = "expertmesh_suspensions"
"""What the front end asks the engine's process for: Suspensions, one for each of its dispatchers."""

DEGRADED_RESPONSES = Metric(
    "expertmesh_router_degraded_responses_total",
    "counter",
    (),
    "Responses that went on without an expert, since the router began; only with `engine.degrade_after_s`.",
)
SUSPENDED_REPLICAS = Metric(
    "expertmesh_router_suspended_replicas",
    "gauge",
    ("group",),
    "Replicas that this router gives no rows until they answer a probe.",
)
SUSPENSIONS_TOTAL = Metric(
    "expertmesh_router_suspensions_total",
    "counter",
    ("group", "reason"),
    "How often it suspended one, since it began; reason late, silent, timeout, not_finite, checksum or error.",
)
PROXY_REFUSALS = Metric(
    "expertmesh_proxy_refusals_total",
    "counter",
    (),
    "Requests that a proxy of Ray Serve's answered with 429 itself, as the ingress just had; Ray counts the others.",
)
ROUTER_METRICS = (DEGRADED_RESPONSES, SUSPENDED_REPLICAS, SUSPENSIONS_TOTAL, PROXY_REFUSALS)


class SuspensionMetrics:
    def __init__(self, exporter: Exporter | None = None) -> None:
        self._exporter = exporter or Exporter()
        self._groups: set[str] = set()
        """Those told of so far; a gauge keeps its value until it gets another."""
        self._told: dict[tuple[str, str], int] = {}

    def publish(self, suspensions: Suspensions) -> None:
        """Does nothing where nobody listens."""
        if not self._exporter.wanted:
            return
        now = suspensions["now"]
        self._groups |= now.keys()
        for group in self._groups:
            self._exporter.set(SUSPENDED_REPLICAS, now.get(group, 0), group)
        for group, reasons in suspensions["since_start"].items():
            for reason, count in reasons.items():
                self._exporter.add(SUSPENSIONS_TOTAL, count - self._told.get((group, reason), 0), group, reason)
                self._told[group, reason] = count


async def follow_suspensions(
    ask: Callable[[str], Awaitable[Iterable[Suspensions]]], metrics: SuspensionMetrics
) -> None:
    """Publishes what the engine's process answers, until it ends. While a step waits there, it answers nothing, and
    the last figures are renewed."""
    last = Suspensions(now={}, since_start={})
    while True:
        asked = asyncio.ensure_future(ask(SUSPENSIONS))
        while not (await asyncio.wait([asked], timeout=EVERY_S))[0]:
            metrics.publish(last)
        for last in asked.result():
            metrics.publish(last)
        await asyncio.sleep(EVERY_S)
