"""A replica in a plain process: `python -m expert_service --artifact A --group g --experts 0-3`; ends on SIGTERM."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

from expert_service.local import group_args, serve_replica
from expertmesh.args import GroupArgs
from expertmesh.errors import ExpertMeshError

DRAIN_S = 10.0


def main() -> None:
    arguments = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    port = (arguments.port, arguments.port) if arguments.port else None
    try:
        args = group_args(
            arguments.artifact,
            arguments.group,
            arguments.experts,
            host=arguments.host,
            ports=port,
            device=arguments.device,
            num_threads=arguments.threads,
        )
        serve(args, arguments.directory)
    except ExpertMeshError as error:
        sys.exit(str(error))


def serve(args: GroupArgs, directory: str | None) -> None:
    """Serves until SIGTERM or SIGINT, which all threads leave to this one."""
    stopping = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    with serve_replica(args, directory) as replica:
        print(replica.address, flush=True)
        signal.sigwait(stopping)
        replica.drain(DRAIN_S)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m expert_service", description=__doc__)
    parser.add_argument("--artifact", type=Path, required=True, help="directory made by `expertmesh prepare`")
    parser.add_argument("--group", required=True)
    parser.add_argument("--experts", required=True, help='in every MoE layer: "0-7,12"')
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directory", help="host:port of the directory; without it the replica announces nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
