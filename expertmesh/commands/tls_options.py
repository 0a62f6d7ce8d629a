"""How a command is told what to show to a directory that asks for certificates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from expertmesh.wire.tls import TlsFiles

Tls = Annotated[
    Path | None,
    typer.Option(
        "--tls", metavar="DIR", help="ca.crt, tls.crt and tls.key, where the directory asks for certificates (TLS)."
    ),
]
TlsName = Annotated[
    str | None, typer.Option("--tls-name", help="With --tls: what its certificate bears; default: the address.")
]


def tls_files(folder: Path | None, name: str | None) -> TlsFiles | None:
    from expertmesh.wire.tls import TlsFiles

    return TlsFiles.in_folder(folder, name) if folder else None
