"""`expertmesh down`: ends what `up` started, and nothing else."""

from __future__ import annotations

from typing import Annotated

import typer

from expertmesh.cluster import launch, record
from expertmesh.commands.console import err


def down(
    name: Annotated[
        str | None, typer.Argument(help="Cluster's name, as its config has it; default: the only one.")
    ] = None,
) -> None:
    """Stop a cluster; one that is not running is no error.

    Example: expertmesh down demo
    """
    running = record.find(name)
    if running is None:
        err.print(f"no cluster{f' {name}' if name else ''} is running", highlight=False)
        return
    with err.status(f"stopping {running.name}"):
        launch.stop(running)
    err.print(f"cluster {running.name} has stopped", highlight=False)
