"""Starting, changing and stopping a cluster: mechanism behind `up` and `down`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmesh.args import DIRECTORY_APPLICATION, ROUTER_APPLICATION, experts_application
from expertmesh.artifact.manifest import TRUNK_DIRECTORY, Manifest, read_manifest
from expertmesh.cluster import local_ray, processes, record
from expertmesh.cluster.readiness import Step, steps
from expertmesh.cluster.record import Record
from expertmesh.cluster.serve_api import DashboardSilent, ServeApi
from expertmesh.config import ClusterConfig, load_config
from expertmesh.coverage import check_context, check_coverage
from expertmesh.deployment import directory_port, model_name, serve_config
from expertmesh.directory import secure_port
from expertmesh.directory.client import list_table
from expertmesh.errors import ArtifactError, ClusterError, ConfigError
from expertmesh.rebalance.journal import JournalFile
from expertmesh.resources import check_room, custom_resources, logical_cpus
from expertmesh.retry import retry
from expertmesh.v1 import directory_pb2

Show = Callable[[Sequence[Step]], None]
"""Is told again and again where the applications stand; an empty list while Ray starts."""
GRACE_S = 15.0
RAY_START_S = 90.0
SILENT_S = 60.0
"""For so long Ray's dashboard may leave calls without an answer while replicas start beside it."""


@dataclass(frozen=True)
class Plan:
    """A config that has been checked against its artifact."""

    path: Path
    config: ClusterConfig
    manifest: Manifest

    @property
    def applications(self) -> Mapping[str, str | None]:
        """Application -> its group, for those that have one, in the order in which they are shown."""
        groups = {experts_application(group.name): group.name for group in self.config.groups}
        return {DIRECTORY_APPLICATION: None, **groups, ROUTER_APPLICATION: None}


def read_plan(path: Path) -> Plan:
    """Raises ConfigError or ArtifactError for whatever can be found wrong before anything starts."""
    config = load_config(path)
    manifest = read_manifest(config.model.artifact)
    check_coverage(config, manifest)
    if config.security.tls is not None:
        config.security.tls.read()
    trunk_config = config.model.artifact / TRUNK_DIRECTORY / "config.json"
    try:
        check_context(config, json.loads(trunk_config.read_bytes()))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{trunk_config}: {error}") from None
    return Plan(path, config, manifest)


def known_cluster(plan: Plan) -> Record | None:
    """The running cluster of that name, if there is one; forgets one whose processes have ended."""
    known = record.load(plan.config.name)
    if known is not None and known.marker is not None and not processes.running(known.marker):
        record.forget(known)
        return None
    return known


def start_local(plan: Plan, timeout_s: float, show: Show) -> Record:
    """Starts Ray here and deploys on it; where that fails or is interrupted, nothing of it is left."""
    check_ports(plan.config)
    log = record.state_dir(plan.config.name) / record.RAY_LOG
    variables = secure_port.environment(plan.config)
    ray = local_ray.start(logical_cpus(plan.config), log, custom_resources(plan.config), variables)
    started = _record(plan, ray.dashboard, ray)
    record.save(started)
    try:
        local_ray.wait_until_up(ray, RAY_START_S, lambda: show([]))
        deploy(plan, started, timeout_s, show)
        _remember(plan)
    except BaseException:
        processes.end(ray.marker, GRACE_S)
        record.forget(started)
        raise
    return started


def attach(plan: Plan, dashboard: str, timeout_s: float, show: Show) -> Record:
    """Deploys on a Ray cluster that others run; raises ClusterError where Ray Serve has applications there already."""
    attached = _record(plan, dashboard, None)
    check_alone(attached)
    deploy(plan, attached, timeout_s, show)
    record.save(attached)
    _remember(plan)
    return attached


def change(plan: Plan, running: Record, timeout_s: float, show: Show) -> Record:
    """Applies a config to the cluster that runs; applications that it does not change run on.

    Ends what a rebalance has left unfinished; raises ClusterError where one is under way.
    """
    after = running.model_copy(update=_endpoints(plan) | {"config": str(plan.path.absolute())})
    if after.tls != running.tls:
        raise ConfigError(
            f"{plan.path}: security.tls: cluster {running.name!r} keeps the files that it was started with; stop it "
            f"first with `expertmesh down {running.name}`"
        )
    if (after.http, after.directory) != (running.http, running.directory):
        raise ConfigError(
            f"{plan.path}: server: cluster {running.name!r} listens on {running.http} and {running.directory}; "
            f"stop it first with `expertmesh down {running.name}`"
        )
    journals = JournalFile(record.state_dir(running.name))
    with journals.lock():
        deploy(plan, after, timeout_s, show)
        record.save(after)
        _remember(plan)
        journals.drop()
    return after


def deploy(plan: Plan, target: Record, timeout_s: float, show: Show) -> None:
    """Hands the config to Ray Serve and waits until all is ready; raises ClusterError or ConfigError otherwise."""
    api = ServeApi(target.dashboard, target.token)
    check_room(plan.config, api.nodes())
    api.deploy(serve_config(plan.config, plan.manifest))
    wait_until_ready(plan, target, timeout_s, show)


def wait_until_ready(plan: Plan, target: Record, timeout_s: float, show: Show) -> None:
    """Raises ClusterError where an application fails or is late, or Ray's dashboard stays silent."""
    api = ServeApi(target.dashboard, target.token)
    deadline = time.monotonic() + timeout_s
    while True:
        patience_s = min(SILENT_S, deadline - time.monotonic())
        details = retry(api.details, DashboardSilent, patience_s, 0.5)
        reached = steps(plan.applications, details, _table(target))
        show(reached)
        if failed := next((step for step in reached if step.error), None):
            raise ClusterError(f"application {failed.application}: {failed.error}")
        waiting = [step for step in reached if not step.done]
        if not waiting:
            return
        if time.monotonic() > deadline:
            late = "; ".join(f"{step.application}: {step.status}, {step.detail}" for step in waiting)
            raise ClusterError(f"not ready after {timeout_s:.0f} s: {late}")
        time.sleep(0.5)


def stop(running: Record) -> None:
    """Lets the applications drain, then ends every process that `up` started, and forgets the cluster."""
    alive = running.marker is None or bool(processes.running(running.marker))
    if running.marker is None:
        check_alone(running)
    try:
        if alive:
            ServeApi(running.dashboard, running.token).delete_all()
    except ClusterError:
        if running.marker is None:
            raise
    if running.marker is not None:
        processes.end(running.marker, GRACE_S)
    record.forget(running)


def check_alone(target: Record) -> None:
    """Raises ClusterError that names applications which are not ours: Serve's API replaces or deletes all at once."""
    prefix = experts_application("")
    known = ServeApi(target.dashboard, target.token).details().get("applications", {})
    others = [name for name in known if name not in (DIRECTORY_APPLICATION, ROUTER_APPLICATION)]
    foreign = sorted(name for name in others if not name.startswith(prefix))
    if foreign:
        raise ClusterError(f"{target.dashboard}: Ray Serve runs applications of others there: {', '.join(foreign)}")


def check_ports(config: ClusterConfig) -> None:
    """Raises ClusterError that names a port in use and the key that sets it."""
    server = config.server
    used = [("http_port", server.host, server.http_port), ("grpc_port", "0.0.0.0", server.grpc_port)]
    if config.security.tls is not None:
        used.append(("grpc_tls_port", "0.0.0.0", server.grpc_tls_port))
    for key, host, port in used:
        if not local_ray.port_is_free(host, port):
            raise ClusterError(f"server.{key}: port {port} is in use on this machine; free it or set another")


def way_back(plan: Plan, running: Record) -> str | None:
    """One line where a rebalance has given the cluster other groups than the plan's; None where it has not."""
    deployed = record.load_deployed(running)
    if deployed.source == running.config or deployed.config.groups == plan.config.groups:
        return None
    names = ", ".join(group.name for group in deployed.config.groups)
    return f"takes the cluster back to the groups of {plan.path}; it runs {names} of {deployed.source}"


def _remember(plan: Plan) -> None:
    record.save_deployed(plan.config.name, record.Deployed(source=str(plan.path.absolute()), config=plan.config))


def _table(target: Record) -> directory_pb2.Table | None:
    try:
        return list_table(target.directory, timeout_s=2, tls=target.tls)
    except ClusterError:
        return None


def _endpoints(plan: Plan) -> dict[str, Any]:
    server = plan.config.server
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host
    return {
        "http": f"http://{host}:{server.http_port}",
        "directory": f"{host}:{directory_port(plan.config)}",
        "tls": plan.config.security.tls,
        "model": model_name(plan.config, plan.manifest),
    }


def _record(plan: Plan, dashboard: str, ray: local_ray.LocalRay | None) -> Record:
    if ray is None:
        ours = {"token": os.environ.get("RAY_AUTH_TOKEN")}
    else:
        ours = {"token": ray.token, "marker": ray.marker, "temp_dir": str(ray.temp_dir)}
    path = str(plan.path.absolute())
    return Record(name=plan.config.name, config=path, dashboard=dashboard, **_endpoints(plan), **ours)
