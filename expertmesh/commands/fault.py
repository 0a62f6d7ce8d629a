"""`expertmesh fault`: breaks something that `expertmesh up` started on this machine, to see what it costs."""

from __future__ import annotations

import json
import threading
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import psutil
import typer

from expertmesh.commands.console import err
from expertmesh.errors import ClusterError

if TYPE_CHECKING:
    from loadtest.config import Fault

fault = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
Group = Annotated[str, typer.Argument(help="Whose replica.")]
Cluster = Annotated[str | None, typer.Option(help="A running cluster's name; default: the only one.")]
Replica = Annotated[int, typer.Option(help="Which of the group's, in the order of their ids.", min=0)]
For = Annotated[float, typer.Option("--for", help="Seconds.", min=0.01, max=3600)]
Json = Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")]


@fault.callback()
def about() -> None:
    """Break something in a cluster that `expertmesh up` started on this machine; clients should not notice.

    Faults on a schedule, under load and with figures: `faults:` of `expertmesh loadtest`.

    Example: expertmesh fault kill b
    """


@fault.command()
def kill(group: Group, replica: Replica = 0, cluster: Cluster = None, as_json: Json = False) -> None:
    """Kill a replica's process (SIGKILL). Ray Serve starts another.

    Example: expertmesh fault kill b --replica 1
    """
    from loadtest.config import Fault

    _inflict(Fault(at_s=0, kind="kill", group=group, replica=replica), cluster, as_json)


@fault.command()
def hang(group: Group, seconds: For = 5, replica: Replica = 0, cluster: Cluster = None, as_json: Json = False) -> None:
    """Stop a replica's process (SIGSTOP) for some seconds. Its connections stay open and silent.

    Example: expertmesh fault hang b --for 10
    """
    from loadtest.config import Fault

    _inflict(Fault(at_s=0, kind="hang", group=group, replica=replica, for_s=seconds), cluster, as_json)


@fault.command()
def slow(
    group: Group,
    seconds: For = 5,
    factor: Annotated[float, typer.Option(help="How many times slower.", min=1.01, max=100)] = 4,
    replica: Replica = 0,
    cluster: Cluster = None,
    as_json: Json = False,
) -> None:
    """Let a replica's process run a part of the time only.

    Example: expertmesh fault slow b --for 10 --factor 4
    """
    from loadtest.config import Fault

    _inflict(Fault(at_s=0, kind="slow", group=group, replica=replica, for_s=seconds, factor=factor), cluster, as_json)


@fault.command()
def partition(
    group: Group, seconds: For = 5, replica: Replica = 0, cluster: Cluster = None, as_json: Json = False
) -> None:
    """Let nothing through to a replica's port nor from it, and reset no connection. The directory still hears from it.

    Needs CAP_NET_ADMIN and iproute2: it adds two rules to this machine's routing for that port, and takes them away.

    Example: sudo -E expertmesh fault partition b --for 10
    """
    from loadtest.config import Fault

    _inflict(Fault(at_s=0, kind="partition", group=group, replica=replica, for_s=seconds), cluster, as_json)


class What(StrEnum):
    rows = "rows"
    dtype = "dtype"
    nan = "nan"
    checksum = "checksum"


@fault.command()
def corrupt(
    group: Group,
    seconds: For = 5,
    what: Annotated[
        What, typer.Option(help="A row too few, another type, a NaN, or a changed bit that only a checksum tells.")
    ] = What.rows,
    replica: Replica = 0,
    cluster: Cluster = None,
    as_json: Json = False,
) -> None:
    """Add a replica whose answers are wrong. It hands rows to the one that is named and spoils what that one answers.

    Routers find it in the directory like any other. With `security.tls` it shows the cluster's certificate. `--what
    checksum` is refused where the config lacks `engine.checksums`: the wrong sums would be used.

    Example: expertmesh fault corrupt b --for 10 --what nan
    """
    from loadtest.config import Fault

    wanted = {"at_s": 0, "kind": "corrupt", "group": group, "replica": replica, "for_s": seconds, "what": what}
    _inflict(Fault.model_validate(wanted), cluster, as_json)


class Part(StrEnum):
    directory = "directory"
    router = "router"
    controller = "controller"
    proxy = "proxy"


@fault.command()
def restart(
    part: Annotated[Part, typer.Argument(help="Ray Serve's controller and proxy, the directory or a router.")],
    replica: Annotated[int, typer.Option(help="Which of several routers.", min=0)] = 0,
    cluster: Cluster = None,
    as_json: Json = False,
) -> None:
    """Kill a part that is there once (SIGKILL), or a router. Ray or Ray Serve starts another.

    Example: expertmesh fault restart directory
    """
    from loadtest.config import Fault

    _inflict(Fault.model_validate({"at_s": 0, "kind": f"restart_{part}", "replica": replica}), cluster, as_json)


def _inflict(wanted: Fault, name: str | None, as_json: bool) -> None:
    """Returns when the fault is over. Interrupted, it undoes what it did."""
    from expertmesh.cluster import record
    from loadtest.faults import find_victim, inflict, own

    victim = find_victim(wanted, own(record.require(name)))
    target, process = victim.name, victim.process
    length = f" for {wanted.for_s:g} s" if wanted.for_s is not None else ""
    err.print(f"{wanted.kind.replace('_', ' ')}{length}: {target}, process {process.pid}", highlight=False)
    try:
        answers = inflict(wanted, victim, threading.Event())
    except psutil.Error as error:
        raise ClusterError(f"{target}: {error}") from None
    told = {"kind": wanted.kind, "target": target, "pid": process.pid, "for_s": wanted.for_s}
    if wanted.kind == "corrupt":
        err.print(f"{answers} answers were corrupt", highlight=False)
        told |= {"what": wanted.what, "answers": answers}
    if as_json:
        typer.echo(json.dumps(told))
