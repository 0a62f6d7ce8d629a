"""The API server as kubectl finds it: by a kubeconfig, or in a pod by its ServiceAccount."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client
from kubernetes.config import ConfigException, kube_config
from kubernetes.config.incluster_config import InClusterConfigLoader

from expertmesh.errors import ConfigError
from expertmesh.yaml_file import parse_mapping

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
DEFAULT_NAMESPACE = "default"


@dataclass(frozen=True)
class Connection:
    api: Any
    """kubernetes.client.ApiClient."""
    namespace: str

    @property
    def url(self) -> str:
        return str(self.api.configuration.host)


def connect(
    kubeconfig: Path | None = None,
    context: str | None = None,
    namespace: str | None = None,
    account: Path = SERVICE_ACCOUNT,
    environ: Mapping[str, str] = os.environ,
) -> Connection:
    """A kubeconfig that is named, by $KUBECONFIG too, or that stands at its default place comes before a pod's account.

    Raises ConfigError where there is none of them, or it cannot be used. Nothing is asked of the API server yet.
    """
    places = (
        [kubeconfig] if kubeconfig else [Path(one) for one in environ.get("KUBECONFIG", "").split(os.pathsep) if one]
    )
    default = Path.home() / ".kube/config"
    in_pod = "KUBERNETES_SERVICE_HOST" in environ and (account / "token").exists()
    if places and not any(place.exists() for place in places):
        raise ConfigError(f"no kubeconfig at {', '.join(map(str, places))}")
    if not places and default.exists():
        places = [default]
    if not places and not in_pod:
        raise ConfigError(f"no kubeconfig at {default}, and this is no pod with a ServiceAccount")
    try:
        if places:
            return _by_kubeconfig([place for place in places if place.exists()], context, namespace)
        if context is not None:
            raise ConfigError("--context names one of a kubeconfig's contexts; this pod has its ServiceAccount alone")
        return _by_account(account, namespace, environ)
    except (ConfigException, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        where = ", ".join(map(str, places)) or str(account)
        raise ConfigError(f"{where}: {_reason(error)}") from None


def _by_kubeconfig(places: list[Path], context: str | None, namespace: str | None) -> Connection:
    """Of several files, the first that says something is believed, as kubectl does."""
    begins = "a kubeconfig begins with `apiVersion: v1` and `kind: Config`"
    files = [parse_mapping(place.read_text(), place, begins) for place in places]
    named = [one for file in reversed(files) for one in file.get("contexts") or []]
    contexts = {one["name"]: one.get("context") or {} for one in named}
    where, known = ", ".join(map(str, places)), ", ".join(sorted(contexts)) or "none"
    chosen = context or next((file["current-context"] for file in files if file.get("current-context")), None)
    if chosen is None:
        raise ConfigError(f"{where}: no current-context; say --context, of which there are {known}")
    if chosen not in contexts:
        raise ConfigError(f"{where}: no context {chosen!r}; its contexts are {known}")
    settings = client.Configuration()
    kube_config.load_kube_config(os.pathsep.join(map(str, places)), chosen, settings, persist_config=False)
    if not settings.host:
        raise ConfigError(f"{where}: cluster {contexts[chosen].get('cluster')} has no server")
    return _connection(settings, namespace or contexts[chosen].get("namespace") or DEFAULT_NAMESPACE)


def _by_account(account: Path, namespace: str | None, environ: Mapping[str, str]) -> Connection:
    settings = client.Configuration()
    loader = InClusterConfigLoader(str(account / "token"), str(account / "ca.crt"), environ=environ)
    loader.load_and_set(settings)
    own = account / "namespace"
    return _connection(settings, namespace or (own.read_text().strip() if own.exists() else DEFAULT_NAMESPACE))


def _connection(settings: Any, namespace: str) -> Connection:
    # what fails is tried again here, where it is known whether that is safe
    settings.retries = False
    if not settings.verify_ssl:
        # the kubeconfig says insecure-skip-tls-verify
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    return Connection(client.ApiClient(settings), namespace)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
