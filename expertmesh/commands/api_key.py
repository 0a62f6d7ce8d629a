"""`expertmesh api-key`: the keys that the OpenAI API asks for where the config names their file."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from expertmesh import api_key_file, api_keys
from expertmesh.commands.console import err, out

DEFAULT_FILE = Path("api-keys.txt")

api_key = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
File = Annotated[Path, typer.Option("--file", help="File of the keys' hashes, as `security.api_keys` names it.")]


@api_key.callback()
def about() -> None:
    """Make, list and revoke API keys. The file holds hashes only, and a running cluster follows its changes.

    Example: export OPENAI_API_KEY=$(expertmesh api-key create --name alice)
    """


@api_key.command()
def create(
    name: Annotated[str | None, typer.Option(help="Whose key it is; default: key-1, key-2, ...")] = None,
    file: File = DEFAULT_FILE,
) -> None:
    """Make a key and print it, this once; the file gets its hash.

    Example: expertmesh api-key create --name alice --file api-keys.txt
    """
    added, key = api_key_file.create(file, name)
    typer.echo(key)
    err.print(f"{added.name}: stored in {file}; the key is not shown again", highlight=False, soft_wrap=True)


@api_key.command("list")
def list_keys(
    file: File = DEFAULT_FILE,
    json: Annotated[bool, typer.Option("--json", help="For programs: a list of objects.")] = False,
) -> None:
    """Show the names of the keys and when they were made.

    Example: expertmesh api-key list --json
    """
    keys = api_keys.read(file)
    if json:
        typer.echo(json_format.dumps([{"name": key.name, "created": key.created.isoformat()} for key in keys]))
        return
    table = Table("name", "created")
    for key in keys:
        table.add_row(key.name, key.created.isoformat())
    out.print(table)


@api_key.command()
def revoke(name: Annotated[str, typer.Argument(help="The key's name.")], file: File = DEFAULT_FILE) -> None:
    """Take a key out of the file: it opens nothing from the next request on.

    Example: expertmesh api-key revoke alice --file api-keys.txt
    """
    api_key_file.revoke(file, name)
    err.print(f"{name}: revoked in {file}", highlight=False, soft_wrap=True)
