"""What of a cluster others can reach who perhaps should not, a line each: `up` says it."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

import psutil

from expertmesh.config import ClusterConfig

LOOK_S = 0.5
LOCALHOST = "localhost"


def exposures(config: ClusterConfig, dashboard: str, token: str | None) -> list[str]:
    """Empty where all is on loopback or asks who comes. `dashboard`: URL of Ray's; `token`: what Ray asks for, if it
    does."""
    found = []
    server, security = config.server, config.security
    if not is_loopback(server.host) and security.api_keys is None:
        found.append(f"the OpenAI API at {server.host}:{server.http_port} asks for no key (security.api_keys)")
    if not is_loopback(server.replica_host) and security.tls is None:
        found.append("replicas take rows from whoever reaches them (security.tls)")
    if not token and (where := open_dashboard(dashboard)):
        found.append(f"Ray's dashboard answers at {where} without a token: who reaches it can run code in the cluster")
    return found


def open_dashboard(url: str) -> str:
    """host:port at which the dashboard can be reached from elsewhere; empty where it is on loopback alone."""
    parts = urlsplit(url)
    host, port = parts.hostname or LOCALHOST, parts.port or (443 if parts.scheme == "https" else 80)
    if not is_loopback(host):
        return f"{host}:{port}"
    return next((f"{address}:{port}" for address in own_addresses() if _listens(address, port)), "")


def is_loopback(host: str) -> bool:
    """A name other than localhost counts as none."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == LOCALHOST


def own_addresses() -> list[str]:
    """IPv4 addresses of this machine by which others reach it."""
    addresses = [one.address for own in psutil.net_if_addrs().values() for one in own if one.family == socket.AF_INET]
    return [address for address in addresses if not is_loopback(address)]


def _listens(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=LOOK_S):
            return True
    except OSError:
        return False
