"""A directory in a plain process: `python -m expertmesh.directory --port 9100` prints its address."""

from __future__ import annotations

import argparse
import asyncio
import sys

from expertmesh.directory.server import start_directory
from expertmesh.errors import ClusterError


async def serve(host: str, port: int) -> None:
    server, address = await start_directory(host, port)
    print(address, flush=True)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m expertmesh.directory", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any")
    arguments = parser.parse_args()
    try:
        asyncio.run(serve(arguments.host, arguments.port))
    except ClusterError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
