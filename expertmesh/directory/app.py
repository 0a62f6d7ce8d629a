"""The directory as a Ray Serve application, reached through Serve's gRPC proxy.

Serve must be started with `SERVICER_FUNCTION` among its `grpc_servicer_functions`, and the application deployed with
`DIRECTORY_ROUTE_PREFIX`, since the proxy knows no application without a route. Callers name the application in the
metadata `application`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from expertmesh.args import DIRECTORY_DEPLOYMENT, DirectoryArgs
from expertmesh.directory.directory import Directory
from expertmesh.errors import WireError
from expertmesh.v1 import directory_pb2 as pb

SERVICER_FUNCTION = "expertmesh.v1.directory_pb2_grpc.add_DirectoryServiceServicer_to_server"
MAX_WATCHERS = 10_000


class DirectoryDeployment:
    """Methods bear the names of the calls, by which Serve's proxy finds them."""

    def __init__(self) -> None:
        self._directory = Directory()

    async def __call__(self, request: Request) -> Response:
        return Response("the directory speaks gRPC alone\n", status_code=404)

    async def Announce(self, request: pb.AnnounceRequest, grpc_context: Any) -> pb.AnnounceResponse:
        try:
            return self._directory.announce(request)
        except WireError as error:
            grpc_context.set_code(grpc.StatusCode.INVALID_ARGUMENT)
            grpc_context.set_details(str(error))
            raise

    async def Withdraw(self, request: pb.WithdrawRequest) -> pb.WithdrawResponse:
        return self._directory.withdraw(request)

    async def List(self, request: pb.ListRequest) -> pb.Table:
        return self._directory.list()

    async def Watch(self, request: pb.WatchRequest) -> AsyncIterator[pb.Table]:
        async with aclosing(self._directory.watch()) as tables:
            async for table in tables:
                yield table

    async def watchers(self) -> int:
        """Watches that are open."""
        return self._directory.watchers


def build(args: dict[str, Any]) -> Any:
    """The application; raises pydantic's ValidationError on arguments it does not know.

    One replica, since the table lives in its memory. A watch never ends by itself, so a replica that is stopped does
    not wait for its watchers: they come back to the next one.
    """
    DirectoryArgs.model_validate(args)
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
    return deployment(DirectoryDeployment).bind()
