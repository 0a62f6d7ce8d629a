"""A directory with a gRPC server of its own, for tests and for use without Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc

from expertmesh.directory.directory import Applications, Directory
from expertmesh.errors import ClusterError, WireError
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import directory_pb2_grpc
from expertmesh.wire.channel import SERVER_OPTIONS, server_credentials
from expertmesh.wire.tls import CurrentTls, TlsFiles

Context = grpc.aio.ServicerContext[Any, Any]


class DirectoryServicer(directory_pb2_grpc.DirectoryServiceServicer):
    def __init__(self, directory: Directory, credentials: grpc.ServerCredentials | None = None) -> None:
        self._directory = directory
        self._credentials = credentials  # for as long as the port is open

    async def Announce(self, request: pb.AnnounceRequest, context: Context) -> pb.AnnounceResponse:
        async with refusing(context):
            return self._directory.announce(request)

    async def Withdraw(self, request: pb.WithdrawRequest, context: Context) -> pb.WithdrawResponse:
        return self._directory.withdraw(request)

    async def List(self, request: pb.ListRequest, context: Context) -> pb.Table:
        return self._directory.list()

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.Table]:
        async with aclosing(self._directory.watch()) as tables:
            async for table in tables:
                yield table

    async def ExpertLoad(self, request: pb.ExpertLoadRequest, context: Context) -> pb.ExpertLoadReply:
        async with refusing(context):
            return self._directory.expert_load(request)

    async def Want(self, request: pb.WantRequest, context: Context) -> pb.WantResponse:
        async with refusing(context):
            return await self._directory.want(request)

    async def ReportDecision(self, request: pb.ScalingDecision, context: Context) -> pb.ReportDecisionResponse:
        async with refusing(context):
            return self._directory.report_decision(request)

    async def Scaling(self, request: pb.ScalingRequest, context: Context) -> pb.ScalingReply:
        return self._directory.scaling()


@asynccontextmanager
async def refusing(context: Context) -> AsyncIterator[None]:
    """A request of no use is refused with INVALID_ARGUMENT, without `abort`: gRPC would keep its exception, and with it
    the request, until garbage is collected."""
    try:
        yield
    except WireError as error:
        context.set_code(grpc.StatusCode.INVALID_ARGUMENT)
        context.set_details(str(error))


async def start_directory(
    host: str, port: int, applications: Applications | None = None, tls: TlsFiles | None = None
) -> tuple[grpc.aio.Server, str]:
    """A running server on the current event loop and its host:port; port 0 takes any. It wakes groups by means of
    `applications`, and with `tls` asks its callers for certificates.

    Raises ClusterError where the port is in use, ConfigError where the files cannot serve.
    """
    server = grpc.aio.server(options=SERVER_OPTIONS)
    credentials = server_credentials(CurrentTls(tls)) if tls else None
    servicer = DirectoryServicer(Directory(applications), credentials)
    directory_pb2_grpc.add_DirectoryServiceServicer_to_server(servicer, server)
    address = f"{host}:{port}"
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        raise ClusterError(f"directory: port {port} is in use on {host}") from None
    await server.start()
    return server, f"{host}:{bound}"
