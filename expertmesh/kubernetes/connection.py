"""The API server as kubectl finds it: by a kubeconfig, or in a pod by its ServiceAccount."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
import yaml
from kubernetes import client
from kubernetes.config import ConfigException, kube_config
from kubernetes.config.incluster_config import InClusterConfigLoader

from expertmesh.errors import ConfigError

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
    if not places and (default.exists() or not in_pod):
        places = [default]
    try:
        if places:
            return _by_kubeconfig(places, context, namespace)
        if context is not None:
            raise ConfigError("--context names one of a kubeconfig's contexts; this pod has its ServiceAccount alone")
        return _by_account(account, namespace, environ)
    except (ConfigException, yaml.YAMLError, OSError, ValueError, TypeError, KeyError) as error:
        where = ", ".join(map(str, places)) or str(account)
        raise ConfigError(f"{where}: {_first_line(error)}") from None


def _by_kubeconfig(places: list[Path], context: str | None, namespace: str | None) -> Connection:
    if not any(place.exists() for place in places):
        raise ConfigError(f"no kubeconfig at {', '.join(map(str, places))}, and this is no pod with a ServiceAccount")
    paths = os.pathsep.join(str(place) for place in places)
    contexts, active = kube_config.list_kube_config_contexts(paths)
    chosen = next((one for one in contexts if one["name"] == context), active if context is None else None)
    if chosen is None:
        known = ", ".join(sorted(one["name"] for one in contexts))
        raise ConfigError(f"{paths}: no context {context!r}; its contexts are {known}")
    settings = client.Configuration()
    kube_config.load_kube_config(paths, chosen["name"], settings, persist_config=False)
    return _connection(settings, namespace or chosen["context"].get("namespace") or DEFAULT_NAMESPACE)


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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
