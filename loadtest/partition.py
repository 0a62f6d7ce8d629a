"""A silent partition of one TCP port of this machine: nothing that goes to it or comes from it arrives, no connection
is reset. By Linux's routing rules, so that it holds on loopback too; needs CAP_NET_ADMIN and iproute2's `ip`."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from expertmesh.cluster.record import state_home
from expertmesh.errors import ClusterError

OURS, LOCAL = "1", "2"
"""Preferences. The rule for this machine's own addresses has 0, which nothing precedes: it gives way to a twin at 2."""
SIDES = ("sport", "dport")


@contextmanager
def cut_off(port: int) -> Iterator[None]:
    """While the context lasts; raises ClusterError where this user or machine cannot."""
    with _alone():
        _rule("add", "pref", LOCAL, "lookup", "local", but="File exists")
        for side in SIDES:
            _blackhole("add", side, port)
        _rule("del", "pref", "0", "lookup", "local", but="No such file")
    try:
        yield
    finally:
        with _alone():
            for side in SIDES:
                _blackhole("del", side, port)
            if not any(line.startswith(f"{OURS}:") for line in _rule("list").splitlines()):  # of other partitions
                _rule("add", "pref", "0", "lookup", "local", but="File exists")
                _rule("del", "pref", LOCAL, "lookup", "local", but="No such file")


def _blackhole(what: str, side: str, port: int) -> None:
    _rule(what, "pref", OURS, "ipproto", "tcp", side, str(port), "blackhole", but="File exists")


@contextmanager
def _alone() -> Iterator[None]:
    """Of all processes of this user that change rules."""
    folder = state_home()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "partition.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _rule(*arguments: str, but: str = "\0") -> str:
    """`but`: part of an error that is none here."""
    try:
        done = subprocess.run(["ip", "rule", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ClusterError("a partition needs `ip` of iproute2, which is not on the PATH") from None
    if done.returncode and but not in done.stderr:
        said = done.stderr.strip().splitlines()
        raise ClusterError(f"a partition needs CAP_NET_ADMIN: ip rule {arguments[0]}: {said[-1] if said else 'failed'}")
    return done.stdout
