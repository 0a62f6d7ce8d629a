"""What survives the restart of what is there once, or of a router: as `chaos`, with the same cluster, load and figures.

SIGKILL to one of the two routers, to Ray Serve's HTTP and gRPC proxy and to Ray Serve's controller, under load;
`back_s` is until Ray Serve says that everything runs again. Requests that were open at the router or the proxy that
died are lost with it; a router's others go to the other one. Ray's GCS is not among them: without a database of its
own, which `up` does not set up, its end is the end of the cluster.
"""

from __future__ import annotations

import asyncio

from benchmarks.chaos import LEAD_S, Chaos, Inflict, Phase, run_with
from loadtest.config import Fault, FaultKind

TIMES = 2


def run(cluster: str | None) -> dict[str, object]:
    """`cluster` is not used: it starts its own."""
    return run_with(Restarts)


class Restarts(Chaos):
    overloads = False

    def phases(self) -> dict[str, tuple[Inflict, str]]:
        kinds: tuple[FaultKind, ...] = ("restart_proxy", "restart_controller", "restart_router")
        return {kind: (self.restart(kind), "") for kind in kinds}

    def restart(self, kind: FaultKind) -> Inflict:
        async def inflict_all(phase: Phase) -> None:
            await asyncio.sleep(LEAD_S)
            for number in range(TIMES):
                await self.hit(phase, Fault(at_s=0, kind=kind, replica=number if kind == "restart_router" else 0))
            await self.last_a_minute(phase)

        return inflict_all
