"""`expertmesh prepare`: a checkpoint -> an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from expertmesh.commands.console import err


def prepare(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A Hugging Face checkpoint directory (safetensors).")],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="The artifact's directory; it must not exist yet.")
    ],
) -> None:
    """Make an artifact that a cluster can serve from a checkpoint; an interrupted run is continued.

    Example: expertmesh prepare ./Qwen3-30B-A3B ./artifacts/qwen3
    """
    run_prepare(source, destination)


def run_prepare(source: Path, destination: Path) -> None:
    from expertmesh.artifact.prepare import PrepareProgress
    from expertmesh.artifact.prepare import prepare as prepare_artifact

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(f"{source.name}: reading", total=None)

        def show(now: PrepareProgress) -> None:
            bar.update(task, description=f"{now.state} {now.what}", completed=now.bytes_done, total=now.bytes_total)

        manifest = prepare_artifact(source, destination, progress=show)
    layers = len(manifest.layers)
    said = f"{destination}: {manifest.architecture}, {layers} MoE layers, fingerprint {manifest.fingerprint[:12]}"
    err.print(said, highlight=False, soft_wrap=True)
