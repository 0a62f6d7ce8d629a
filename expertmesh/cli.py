"""The command line, `expertmesh`."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

import expertmesh
from expertmesh.commands.api_key import api_key
from expertmesh.commands.config_schema import config_schema
from expertmesh.commands.down import down
from expertmesh.commands.fault import fault
from expertmesh.commands.generate import generate
from expertmesh.commands.kubernetes import kubernetes
from expertmesh.commands.loadtest import loadtest
from expertmesh.commands.plan import plan
from expertmesh.commands.prepare import prepare
from expertmesh.commands.rebalance import rebalance
from expertmesh.commands.simulate import simulate
from expertmesh.commands.status import status
from expertmesh.commands.top import top
from expertmesh.commands.up import up
from expertmesh.errors import ExpertMeshError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
for command in (up, down, status, top, plan, rebalance, simulate, generate, prepare, config_schema):
    app.command()(command)
app.add_typer(loadtest, name="loadtest")
app.add_typer(fault, name="fault")
app.add_typer(kubernetes, name="kubernetes")
app.add_typer(api_key, name="api-key")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"expertmesh {expertmesh.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve mixture-of-experts models with every group of experts as a service of its own.

    Example: expertmesh prepare ./checkpoint ./artifact && expertmesh up cluster.yaml && expertmesh generate "Hello"
    """


def main() -> None:
    """Exits with 1 and one line on stderr for an ExpertMeshError, 2 for wrong usage, 130 when interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except ExpertMeshError as error:
        print(f"expertmesh: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM cleans up as Ctrl-C does."""
    raise KeyboardInterrupt
