"""Reading, patching and following a RayService on a real API server."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from broken_line import Line
from kuberay_stand_in import NAME, RayServiceObject, account, admin, rule
from kubernetes import client
from kubernetes_testbed import ApiServer

from expertmesh.errors import ClusterError, ConfigError
from expertmesh.kubernetes.bounds import Bounds
from expertmesh.kubernetes.connection import Connection, connect
from expertmesh.kubernetes.ray_services import ATTEMPTS, RayServices
from expertmesh.kubernetes.refusals import Conflict, NotAllowed, NotThere, Unreachable
from expertmesh.kubernetes.serve_text import bounds_of, set_bounds
from expertmesh.kubernetes.service import Service

pytestmark = pytest.mark.kubernetes


def scaled(text: str) -> str:
    return set_bounds(text, "hot", Bounds(2, 7))


def wait_for(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)


def with_token(server: ApiServer, namespace: str, token: str, folder: Path) -> Connection:
    """As a pod with this token finds the API server."""
    (folder / "token").write_text(token)
    (folder / "namespace").write_text(namespace)
    (folder / "ca.crt").write_bytes(server.ca.read_bytes())
    host, _, port = server.url.removeprefix("https://").partition(":")
    return connect(account=folder, environ={"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port})


def test_the_only_one_is_found(services: RayServices, ray_service: RayServiceObject) -> None:
    assert services.find(None).name == services.find(NAME).name == NAME
    RayServiceObject(ray_service.connection, "second").create()
    with pytest.raises(ClusterError, match=r"more than one RayService \(mesh, second\); say which with --name"):
        services.find(None)


def test_a_patch_changes_the_text_alone(services: RayServices, ray_service: RayServiceObject) -> None:
    before = ray_service.get()
    patched = services.patch(NAME, scaled)
    after = ray_service.get()
    assert after["spec"]["serveConfigV2"] == patched.after == scaled(patched.before)
    assert patched.service.generation == before["metadata"]["generation"] + 1
    after["spec"]["serveConfigV2"] = before["spec"]["serveConfigV2"]
    assert after["spec"] == before["spec"]


def test_a_dry_run_is_checked_and_not_kept(services: RayServices, ray_service: RayServiceObject) -> None:
    before = ray_service.get()
    assert bounds_of(services.patch(NAME, scaled, dry_run=True).after, "hot") == Bounds(2, 7)
    assert ray_service.get() == before


def test_nothing_is_sent_where_nothing_changes(services: RayServices, ray_service: RayServiceObject) -> None:
    before = ray_service.get()
    assert services.patch(NAME, lambda text: text).nothing
    assert ray_service.get() == before


def test_a_change_between_read_and_patch_is_not_lost(services: RayServices, ray_service: RayServiceObject) -> None:
    """409: it is read again, and both changes are there."""
    calls = count()

    def edit(text: str) -> str:
        if next(calls) == 0:
            ray_service.write(set_bounds(text, "cold", Bounds(4, 5)))
        return scaled(text)

    patched = services.patch(NAME, edit)
    assert next(calls) == 2
    assert (bounds_of(patched.after, "cold"), bounds_of(patched.after, "hot")) == (Bounds(4, 5), Bounds(2, 7))
    assert ray_service.text == patched.after


def test_one_who_is_always_faster_wins(services: RayServices, ray_service: RayServiceObject) -> None:
    calls = count(1)

    def edit(text: str) -> str:
        ray_service.touch(str(next(calls)))
        return scaled(text)

    before = ray_service.text
    with pytest.raises(Conflict, match=rf"others changed it meanwhile \(409\), {ATTEMPTS} times; nothing was changed"):
        services.patch(NAME, edit)
    assert ray_service.get()["metadata"]["annotations"]["touched"] == str(ATTEMPTS)
    assert ray_service.text == before


def test_an_edit_that_refuses_changes_nothing(services: RayServices, ray_service: RayServiceObject) -> None:
    before = ray_service.get()
    with pytest.raises(ConfigError, match="no group 'hto'; the groups are hot, cold"):
        services.patch(NAME, lambda text: set_bounds(text, "hto", Bounds(1, 1)))
    assert ray_service.get() == before


def test_absent(services: RayServices, api_server: ApiServer, namespace: str, ray_service: RayServiceObject) -> None:
    with pytest.raises(NotThere, match=rf"^no rayservices.ray.io named other in namespace {namespace}$"):
        services.find("other")
    ray_service.delete()
    with pytest.raises(NotThere, match=rf"^no RayService in namespace {namespace}$"):
        services.find(None)
    nowhere = RayServices(admin(api_server, "nowhere"))
    with pytest.raises(NotThere, match="no RayService in namespace nowhere"):
        nowhere.find(None)


def test_rights_that_are_missing_are_named(
    api_server: ApiServer, namespace: str, ray_service: RayServiceObject, tmp_path: Path
) -> None:
    """403, as a pod with its ServiceAccount."""
    token = account(api_server, namespace, [rule("ray.io", "rayservices", "get")])
    services = RayServices(with_token(api_server, namespace, token, tmp_path))
    assert services.find(NAME).name == NAME
    with pytest.raises(
        NotAllowed, match=rf"^not allowed to list rayservices.ray.io in namespace {namespace} \(403\): "
    ):
        services.find(None)
    before = ray_service.text
    with pytest.raises(NotAllowed, match=r"not allowed to patch rayservices\.ray\.io") as refused:
        services.patch(NAME, scaled)
    assert "system:serviceaccount:" in str(refused.value) and "\n" not in str(refused.value)
    assert ray_service.text == before
    with pytest.raises(NotAllowed, match=r"not allowed to watch rayservices\.ray\.io"):
        list(services.follow(NAME, every_s=1))


def test_the_least_rights_suffice(
    api_server: ApiServer, namespace: str, ray_service: RayServiceObject, tmp_path: Path
) -> None:
    own = rule("ray.io", "rayservices", "get", "list", "watch", "patch") | {"resourceNames": [NAME]}
    services = RayServices(with_token(api_server, namespace, account(api_server, namespace, [own]), tmp_path))
    services.patch(NAME, scaled)
    found = services.follow(NAME, every_s=1)
    assert next(found).generation == 2 and next(found).generation == 2


def test_credentials_that_are_wrong(api_server: ApiServer, namespace: str, tmp_path: Path) -> None:
    services = RayServices(with_token(api_server, namespace, "wrong", tmp_path))
    with pytest.raises(NotAllowed, match=r"\(401\): .* does not accept the credentials; have they expired\?$"):
        services.find(None)


def test_no_api_server(api_server: ApiServer, namespace: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        connection = elsewhere(admin(api_server, namespace), nobody.getsockname()[1])
        with pytest.raises(
            Unreachable, match=r"^the API server at https://127.0.0.1:\d+ does not answer: [^\n]*refused"
        ):
            RayServices(connection).find(None)


def elsewhere(connection: Connection, port: int) -> Connection:
    """The same server behind another port."""
    # this hook reads the kubeconfig again, and the address with it
    connection.api.configuration.refresh_api_key_hook = None
    connection.api.configuration.host = f"https://127.0.0.1:{port}"
    return dataclasses.replace(connection, api=client.ApiClient(connection.api.configuration))


def test_changes_are_followed(services: RayServices, ray_service: RayServiceObject) -> None:
    found = services.follow(NAME, every_s=20)
    assert next(found).observed_generation == 0
    ray_service.report({"router": "RUNNING"})
    statuses = [next(found).application("router"), next(found).application("router")]
    assert statuses[0] is None and statuses[1] is not None and statuses[1].status == "RUNNING"
    ray_service.delete()
    with pytest.raises(NotThere, match="was deleted"):
        list(found)


def test_a_quiet_one_is_read_again(services: RayServices, ray_service: RayServiceObject) -> None:
    """So that who waits can look at the clock."""
    found = services.follow(NAME, every_s=1)
    versions = {next(found).resource_version for _ in range(3)}
    assert len(versions) == 1


def test_a_watch_that_breaks_is_opened_again(
    api_server: ApiServer, services: RayServices, ray_service: RayServiceObject, namespace: str
) -> None:
    with Line(api_server.url) as line:
        far = RayServices(elsewhere(admin(api_server, namespace), line.port))
        generations: list[int] = []

        def read() -> None:
            for found in far.follow(NAME, every_s=60):
                generations.append(found.generation)
                if found.generation == 3:
                    return

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        wait_for(lambda: generations == [1], "the first read")
        services.patch(NAME, scaled)
        wait_for(lambda: generations[-1] == 2, "what the watch says")
        line.cut()
        services.patch(NAME, lambda text: set_bounds(text, "hot", Bounds(2, 8)))
        wait_for(lambda: not reader.is_alive(), "what a new watch says")
        assert generations == sorted(generations)
        assert line.accepted >= 2


def test_one_that_is_silent_for_too_long_is_given_up(
    api_server: ApiServer, ray_service: RayServiceObject, namespace: str
) -> None:
    with Line(api_server.url) as line:
        far = RayServices(elsewhere(admin(api_server, namespace), line.port))
        found = far.follow(NAME, every_s=60, silence_s=0.5)
        next(found)
        line.close()
        with pytest.raises(Unreachable, match="does not answer"):
            list(found)


class Forgetful(RayServices):
    """Reads what the API server's watch no longer goes back to, once."""

    reads = 0

    def get(self, name: str) -> Service:
        self.reads += 1
        found = super().get(name)
        return found.model_copy(update={"resource_version": "1"}) if self.reads == 1 else found


def test_a_version_that_is_too_old_is_read_again(ray_service: RayServiceObject) -> None:
    """410."""
    services = Forgetful(ray_service.connection)
    for number in range(3):
        ray_service.touch(str(number))
    found = services.follow(NAME, every_s=60)
    assert next(found).resource_version == "1"
    assert int(next(found).resource_version) > 1
    assert services.reads == 2
