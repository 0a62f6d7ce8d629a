"""A host of its own on this machine: a network namespace, and a cable of two veth ends that can lose everything.

Silence is made at the cable: frames are addressed to a station that nobody is, so that they leave without an error and
whoever gets them drops them without an answer. A link that is down, a blackhole or an unreachable route, or an address
that nobody resolves would tell the sender, who then need not find out by itself. Needs CAP_NET_ADMIN, CAP_SYS_ADMIN and
iproute2's `ip`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address

from expertmesh.errors import ClusterError

NETWORK = IPv4Address("198.18.0.0")
"""Of RFC 2544, for benchmarks; each host takes a /30 of the first /16."""
PREFIX, HOSTS = 30, 2**14
NOBODY = "02:00:00:00:00:01"
THERE = "cable"
"""The cable's end in the namespace."""


@dataclass(frozen=True)
class Host:
    name: str
    """Of the namespace and of the cable's end on this side."""
    here: str
    """This side's address on the cable."""
    address: str

    def command(self, command: Sequence[str]) -> list[str]:
        """That runs `command` there, as the same process."""
        return ["ip", "netns", "exec", self.name, *command]

    @contextmanager
    def silent(self) -> Iterator[None]:
        """While the context lasts nothing comes from the host or gets there, and neither side is told."""
        there = ("-n", self.name, "neigh")
        ends = [(("neigh",), self.address, self.name), (there, self.here, THERE)]
        with ExitStack() as undo:
            for neighbours, address, end in ends:
                # a permanent entry is replaced by no ARP of the other side
                _ip(*neighbours, "replace", address, "lladdr", NOBODY, "dev", end, "nud", "permanent")
                undo.callback(_ip, *neighbours, "del", address, "dev", end)
            yield


@contextmanager
def made_host() -> Iterator[Host]:
    """Up for as long as the context lasts; what runs there must have ended by then. Raises ClusterError where this user
    or machine cannot make one."""
    number = os.getpid() % HOSTS
    here, address = (str(NETWORK + 4 * number + side) for side in (1, 2))
    host = Host(f"em-{os.getpid()}", here, address)
    there = ("-n", host.name)
    with ExitStack() as undo:
        _ip("netns", "add", host.name)
        undo.callback(_ip, "netns", "del", host.name)
        _ip("link", "add", host.name, "type", "veth", "peer", "name", THERE, "netns", host.name)
        undo.callback(_ip, "link", "del", host.name)
        _ip("address", "add", f"{here}/{PREFIX}", "dev", host.name)
        _ip("link", "set", host.name, "up")
        _ip(*there, "address", "add", f"{address}/{PREFIX}", "dev", THERE)
        for one in (THERE, "lo"):
            _ip(*there, "link", "set", one, "up")
        yield host


def _ip(*arguments: str) -> None:
    # of a session of its own: an interrupt that ends the context must not end what undoes it
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, start_new_session=True)
    except FileNotFoundError:
        raise ClusterError("a host of its own needs `ip` of iproute2, which is not on the PATH") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["failed"])[-1]
        raise ClusterError(f"a host of its own needs CAP_NET_ADMIN and CAP_SYS_ADMIN: ip {' '.join(arguments)}: {said}")
