"""`expertmesh kubernetes`: a deployment on Kubernetes. Everything that it needs is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertmesh.commands.tls_options import Tls, TlsName, tls_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from expertmesh.kubernetes.connection import Connection
    from expertmesh.kubernetes.ray_services import RayServices
    from expertmesh.kubernetes.service import Service
    from expertmesh.rebalance.watch import Report
    from expertmesh.wire.tls import TlsFiles

HELP = """Look at and change a deployment on Kubernetes: a RayService of KubeRay, as the Helm chart makes it.

The API server is found as kubectl finds it: by --kubeconfig, $KUBECONFIG or ~/.kube/config, and in a pod by its
ServiceAccount.

Example: expertmesh kubernetes wait -n expertmesh && expertmesh kubernetes scale hot 2 8 -n expertmesh
"""
kubernetes = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=HELP)

Name = Annotated[str | None, typer.Option(help="The RayService; default: the only one in the namespace.")]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Default: the context's, in a pod its own, else `default`.")
]
Kubeconfig = Annotated[Path | None, typer.Option(help="Default: $KUBECONFIG, then ~/.kube/config.")]
Context = Annotated[str | None, typer.Option(help="Of the kubeconfig; default: its current one.")]
Timeout = Annotated[float, typer.Option(help="Seconds until it must be done.", min=1)]
Settle = Annotated[
    float, typer.Option(help="Seconds for which a status must stay; KubeRay reports every 2 s or so.", min=0)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the change, let the API server check it, keep nothing.")]
RollBack = Annotated[
    bool, typer.Option("--rollback/--no-rollback", help="Take the change back where it does not arrive in time.")
]
Json = Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")]


@kubernetes.command()
def status(
    name: Name = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    directory: Annotated[
        str | None,
        typer.Option(help="host:port of Serve's gRPC proxy, to count ready replicas: NAME-serve-svc:9001 in a pod."),
    ] = None,
    tls: Tls = None,
    tls_name: TlsName = None,
    as_json: Json = False,
) -> None:
    """Show conditions, applications, groups with their bounds, and pods by role.

    Ray Serve tells KubeRay no numbers of replicas: they are counted where --directory is given.

    Example: expertmesh kubernetes status -n expertmesh
    """
    from expertmesh.commands.console import out
    from expertmesh.commands.kubernetes_tables import print_report
    from expertmesh.kubernetes.pods import Pods
    from expertmesh.kubernetes.report import make_report
    from expertmesh.kubernetes.serve_text import read_applications

    connection, _, service = _found(name, namespace, kubeconfig, context)
    applications = read_applications(service.serve_config)
    ready = None if directory is None else _ready_replicas(directory, tls_files(tls, tls_name))
    report = make_report(service, Pods(connection).of(service), applications, ready)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        print_report(report, out)


@kubernetes.command()
def wait(
    name: Name = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    timeout: Timeout = 1800,
    settle: Settle = 6,
) -> None:
    """Wait until the RayService is ready and all of its applications run; say on stderr what is awaited.

    Exit code 1 where an application has failed, or after --timeout.

    Example: helm upgrade mesh ./helm/expertmesh -f values.yaml && expertmesh kubernetes wait --name mesh-expertmesh
    """
    from expertmesh.commands.console import err
    from expertmesh.commands.kubernetes_tables import lines
    from expertmesh.kubernetes.goal import Goal
    from expertmesh.kubernetes.serve_text import read_applications
    from expertmesh.kubernetes.waiting import NotReached, Patience, await_goal

    _, services, service = _found(name, namespace, kubeconfig, context)
    wanted = frozenset(read_applications(service.serve_config))
    goal = Goal(service.generation, running=wanted, ready=True)
    try:
        done = await_goal(services, service.name, goal, Patience(timeout, settle), lines(err))
    except NotReached as failure:
        raise NotReached(f"{service.where}: {failure}") from None
    said = f"{service.where} is ready: {len(wanted)} applications run, {done.endpoints} pods take requests"
    err.print(said, highlight=False, soft_wrap=True)


@kubernetes.command()
def logs(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="head, router or experts.")],
    group: Annotated[
        str | None, typer.Argument(metavar="[GROUP]", help="With experts: only the pods of the group's pool.")
    ] = None,
    name: Name = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay, and print lines as they come.")] = False,
    tail: Annotated[int | None, typer.Option(help="Only the last lines of each pod.", min=0)] = None,
) -> None:
    """Print what the pods of a role log, each line behind its pod's name where there is more than one.

    Example: expertmesh kubernetes logs experts hot --follow --tail 20
    """
    from expertmesh.commands.console import err
    from expertmesh.errors import ConfigError
    from expertmesh.kubernetes.pods import ROLES, Pods, chosen, merged

    wanted = next((one for one in ROLES if one == role), None)
    if wanted is None:
        raise ConfigError(f"no role {role!r}; the roles are {', '.join(ROLES)}")
    if group is not None and wanted != "experts":
        raise ConfigError(f"a group goes with the role experts, not with {role}")
    connection, _, service = _found(name, namespace, kubeconfig, context)
    pods = Pods(connection)
    found = chosen(pods.of(service), service, wanted, group)
    sources = {pod.name: pods.lines(pod, follow=follow, tail=tail) for pod in found}

    def tell(problem: str) -> None:
        err.print(f"! {problem}", highlight=False, soft_wrap=True, markup=False)

    for source, line in merged(sources, tell):
        typer.echo(f"[{source}] {line}" if len(found) > 1 else line)


@kubernetes.command()
def scale(
    group: Annotated[str, typer.Argument(metavar="GROUP")],
    least: Annotated[int, typer.Argument(metavar="MIN", help="Fewest replicas; 0 lets the group sleep.")],
    most: Annotated[int, typer.Argument(metavar="MAX", help="Most replicas.")],
    name: Name = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    dry_run: DryRun = False,
    roll_back: RollBack = True,
    timeout: Timeout = 600,
    settle: Settle = 6,
    as_json: Json = False,
) -> None:
    """Give one group other replica bounds, and wait until Ray Serve runs it within them; nothing else is touched.

    Where others change the RayService at the same time, it is read and changed again. The chart's values stay as they
    are: put the same bounds there before the next `helm upgrade`.

    Example: expertmesh kubernetes scale hot 2 8 --dry-run
    """
    from expertmesh.commands.console import err
    from expertmesh.commands.kubernetes_tables import lines
    from expertmesh.kubernetes.bounds import Bounds
    from expertmesh.kubernetes.scale import Scaling
    from expertmesh.kubernetes.serve_text import bounds_of, diff
    from expertmesh.kubernetes.waiting import Patience

    bounds = Bounds(least, most)
    _, services, service = _found(name, namespace, kubeconfig, context)
    scaling = Scaling(services, service.name, group, bounds, Patience(timeout, settle), lines(err))
    patched = scaling.patch(dry_run=dry_run)
    change = diff(patched.before, patched.after, "serveConfigV2")
    if not as_json:
        typer.echo(change, nl=False)
    before = bounds_of(patched.before, group)
    if patched.nothing:
        err.print(f"nothing to do: group {group} has the bounds {bounds}", highlight=False)
    elif not dry_run:
        try:
            scaling.wait(patched, roll_back=roll_back)
        except KeyboardInterrupt:
            back = f"expertmesh kubernetes scale {group} {before.least} {before.most}"
            err.print(f"interrupted; the bounds stay {bounds}; back again: {back}", highlight=False, soft_wrap=True)
            raise
        err.print(f"group {group}: {bounds} replicas, before {before}", highlight=False)
    if as_json:
        applied = not (dry_run or patched.nothing)
        found = {"group": group, "before": vars(before), "after": vars(bounds), "applied": applied, "diff": change}
        typer.echo(json.dumps(found, indent=2))


@kubernetes.command()
def rebalance(
    plan: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="Plan, as `expertmesh plan` makes it.", show_default=False)
    ] = None,
    name: Name = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    artifact: Annotated[
        Path | None, typer.Option(help="Check the plan against this artifact, or a folder with its manifest.json.")
    ] = None,
    save_before: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the groups that run now, as a plan that leads back.")
    ] = None,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    roll_back: RollBack = True,
    timeout: Timeout = 1800,
    settle: Settle = 6,
    watch: Annotated[
        bool, typer.Option("--watch", help="Stay: plan again from the observed loads and apply what is worth it.")
    ] = False,
    observe: Annotated[bool, typer.Option("--observe", help="With --watch: only say what would be applied.")] = False,
    directory: Annotated[
        str | None, typer.Option(help="With --watch: host:port of Serve's gRPC proxy: NAME-serve-svc:9001 in a pod.")
    ] = None,
    tls: Tls = None,
    tls_name: TlsName = None,
    lease: Annotated[
        str | None, typer.Option(help="With --watch: Lease by which one of several processes leads; default: none.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="With --watch: least share of memory x time that a plan saves.", min=0, max=1)
    ] = 0.1,
    memory_gib: Annotated[
        float | None, typer.Option(help="With --watch: of experts in one replica; no limit is known else.", min=1e-9)
    ] = None,
    cool_down: Annotated[float, typer.Option(help="With --watch: seconds between two rebalances.", min=0)] = 600,
    window: Annotated[float, typer.Option(help="With --watch: seconds of load that count.", min=1)] = 300,
    interval: Annotated[float, typer.Option(help="With --watch: seconds between two looks.", min=1)] = 60,
    heartbeat: Annotated[
        Path | None, typer.Option(help="With --watch: file whose time is set while it gets on, for a liveness probe.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --watch: one JSON object per look.")] = False,
) -> None:
    """Bring the RayService to a plan's groups: new ones beside the old, and once they run, the old ones go.

    Until the new groups run, Ctrl-C or a group that does not come up takes everything back. A group of the plan whose
    experts and resources run already stays as it is. The chart's values stay as they are: put the plan's groups there
    before the next `helm upgrade`. With --watch it makes the plans itself, from the loads that the directory saw.

    Example: expertmesh kubernetes rebalance plan.json --save-before before.json --dry-run
    """
    from expertmesh.artifact.manifest import read_manifest
    from expertmesh.commands.console import err
    from expertmesh.commands.kubernetes_tables import lines, print_proposal, save_plan, sure
    from expertmesh.kubernetes.controlled import ControlledService, identity, lead
    from expertmesh.kubernetes.lease import Candidate
    from expertmesh.kubernetes.rebalance import Rebalance
    from expertmesh.kubernetes.transition import propose, running_plan
    from expertmesh.kubernetes.waiting import Patience
    from expertmesh.placement.plan import read_plan_file
    from expertmesh.rebalance.decision import Limits
    from expertmesh.rebalance.watch import Controller

    if (plan is None) != watch:
        raise typer.BadParameter("give either PLAN or --watch")
    if plan is None:
        if directory is None or artifact is None:
            raise typer.BadParameter("--watch needs --directory and --artifact")
        connection, services, service = _found(name, namespace, kubeconfig, context)
        subject = ControlledService(
            services,
            service.name,
            directory,
            artifact,
            read_manifest(artifact),
            Patience(timeout, settle),
            lines(err),
            memory_gib,
            tls_files(tls, tls_name),
        )
        controller = Controller(Limits(threshold, cool_down), window, observe)
        candidate = Candidate(connection, connection.namespace, lease, identity()) if lease else None
        lead(subject, controller, candidate, interval, lambda report: _tell(report, as_json), _beat(heartbeat))
        return
    wanted = read_plan_file(plan)
    manifest = None if artifact is None else read_manifest(artifact)
    _, services, service = _found(name, namespace, kubeconfig, context)
    proposal = propose(service.serve_config, wanted, manifest)
    if proposal.change.nothing:
        err.print("nothing to do: the groups are the plan's", highlight=False)
        return
    print_proposal(proposal, with_diff=dry_run)
    rebalance = Rebalance(services, service.name, proposal.transition, Patience(timeout, settle), lines(err))
    if dry_run:
        rebalance.check()
        return
    if not yes:
        sure()
    if save_before is not None:
        save_plan(running_plan(service.serve_config, wanted.fingerprint), save_before)
    rebalance.run(roll_back=roll_back)
    back = f"; back again: expertmesh kubernetes rebalance {save_before}" if save_before else ""
    err.print(f"done{back}", highlight=False, soft_wrap=True)


def _beat(file: Path | None) -> Callable[[], None]:
    """Sets the file's time; raises ConfigError where that is not possible."""
    from expertmesh.errors import ConfigError

    def touch() -> None:
        try:
            if file is not None:
                file.touch()
        except OSError as error:
            raise ConfigError(f"--heartbeat {file}: {(error.strerror or str(error)).lower()}") from None

    return touch


def _tell(report: Report, as_json: bool) -> None:
    from expertmesh.commands.console import out

    if as_json:
        typer.echo(report.model_dump_json(exclude_none=True))
    else:
        out.print(report.text, highlight=False, soft_wrap=True, markup=False)


def _found(
    name: str | None, namespace: str | None, kubeconfig: Path | None, context: str | None
) -> tuple[Connection, RayServices, Service]:
    from expertmesh.kubernetes.connection import connect
    from expertmesh.kubernetes.ray_services import RayServices

    connection = connect(kubeconfig, context, namespace)
    services = RayServices(connection)
    return connection, services, services.find(name)


def _ready_replicas(directory: str, tls: TlsFiles | None) -> dict[str, int]:
    from collections import Counter

    from expertmesh.directory.client import list_table
    from expertmesh.v1 import expert_pb2

    ready = expert_pb2.REPLICA_STATE_READY
    return Counter(one.group for one in list_table(directory, tls=tls).replicas if one.state == ready)
