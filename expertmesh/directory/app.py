"""The directory as a Ray Serve application, reached through Serve's gRPC proxy.

Serve must be started with `secure_port.add_directory` among its `grpc_servicer_functions`, and the application deployed
with `DIRECTORY_ROUTE_PREFIX`, since the proxy knows no application without a route. Callers name the application in the
metadata `application`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from expertmesh.args import DIRECTORY_DEPLOYMENT, DirectoryArgs
from expertmesh.directory.directory import Directory
from expertmesh.directory.metrics import EVERY_S, WINDOW_S, DirectoryMetrics
from expertmesh.directory.secure_port import VARIABLE, secure_port, shows_certificate
from expertmesh.directory.serve_groups import ServeGroups
from expertmesh.errors import ConfigError, Unauthenticated, WireError
from expertmesh.v1 import directory_pb2 as pb

MAX_WATCHERS = 10_000
HEALTH_PATH = "/healthz"
CODES = {
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    WireError: grpc.StatusCode.INVALID_ARGUMENT,
}


class DirectoryDeployment:
    """Methods bear the names of the calls, by which Serve's proxy finds them."""

    def __init__(self, require_certificate: bool = False) -> None:
        self._require_certificate = require_certificate
        self._directory = Directory(ServeGroups())
        self._metrics = DirectoryMetrics()
        self._publisher: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Serve calls it once it runs, and every few seconds from then on."""
        if self._publisher is None:
            self._publisher = asyncio.create_task(self._publish_forever())
        if self._publisher.done():
            raise RuntimeError(f"metrics are published no more: {self._publisher.exception()}")

    async def __call__(self, request: Request) -> Response:
        """`healthz`: 200, or 503 with the names of the groups whose autoscaler is stalled."""
        if not request.url.path.endswith(HEALTH_PATH):
            return Response(f"the directory speaks gRPC; over HTTP there is {HEALTH_PATH} alone\n", status_code=404)
        health = await self._directory.health()
        return JSONResponse(health, status_code=503 if health["stalled"] else 200)

    async def Announce(self, request: pb.AnnounceRequest, grpc_context: Any) -> pb.AnnounceResponse:
        with self._refusing(grpc_context):
            return self._directory.announce(request)

    async def Withdraw(self, request: pb.WithdrawRequest, grpc_context: Any) -> pb.WithdrawResponse:
        with self._refusing(grpc_context):
            return self._directory.withdraw(request)

    async def List(self, request: pb.ListRequest, grpc_context: Any) -> pb.Table:
        with self._refusing(grpc_context):
            return self._directory.list()

    async def Watch(self, request: pb.WatchRequest, grpc_context: Any) -> AsyncIterator[pb.Table]:
        with self._refusing(grpc_context):
            async with aclosing(self._directory.watch()) as tables:
                async for table in tables:
                    yield table

    async def ExpertLoad(self, request: pb.ExpertLoadRequest, grpc_context: Any) -> pb.ExpertLoadReply:
        with self._refusing(grpc_context):
            return self._directory.expert_load(request)

    async def Want(self, request: pb.WantRequest, grpc_context: Any) -> pb.WantResponse:
        with self._refusing(grpc_context):
            return await self._directory.want(request)

    async def ReportDecision(self, request: pb.ScalingDecision, grpc_context: Any) -> pb.ReportDecisionResponse:
        with self._refusing(grpc_context):
            return self._directory.report_decision(request)

    async def Scaling(self, request: pb.ScalingRequest, grpc_context: Any) -> pb.ScalingReply:
        with self._refusing(grpc_context):
            return self._directory.scaling()

    async def watchers(self) -> int:
        """Watches that are open."""
        return self._directory.watchers

    @contextmanager
    def _refusing(self, grpc_context: Any) -> Iterator[None]:
        """A call that shows no certificate where it must is refused with UNAUTHENTICATED, before anything is done; a
        request of no use with INVALID_ARGUMENT."""
        try:
            if self._require_certificate and not shows_certificate(grpc_context.auth_context()):
                raise Unauthenticated("directory: come by server.grpc_tls_port, with a certificate (security.tls)")
            yield
        except (Unauthenticated, WireError) as error:
            grpc_context.set_code(CODES[type(error)])
            grpc_context.set_details(str(error))
            raise

    async def _publish_forever(self) -> None:
        directory = self._directory
        while True:
            scaling = await directory.scaling_of_existing()
            load = directory.expert_load(pb.ExpertLoadRequest(window_s=WINDOW_S))
            self._metrics.publish(load, directory.registry.replicas(), scaling, time.time())
            await asyncio.sleep(EVERY_S)


def build(args: dict[str, Any]) -> Any:
    """The application; raises pydantic's ValidationError on arguments it does not know, and ConfigError where callers
    are to show certificates but Ray was started without the variable that makes its proxy ask for them.

    One replica, since the table lives in its memory. A watch never ends by itself, so a replica that is stopped does
    not wait for its watchers: they come back to the next one.
    """
    given = DirectoryArgs.model_validate(args)
    if given.require_certificate and secure_port(os.environ) is None:
        raise ConfigError(f"security.tls: {VARIABLE} is missing in the environment that Ray was started with")
    deployment = serve.deployment(
        name=DIRECTORY_DEPLOYMENT,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_WATCHERS,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=1,
        health_check_period_s=2,
        logging_config={"enable_access_log": False},
    )
    return deployment(DirectoryDeployment).bind(given.require_certificate)
