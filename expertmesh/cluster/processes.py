"""The processes of one local cluster: those that inherited its marker in their environment, and no others."""

from __future__ import annotations

import os

import psutil

MARKER = "EXPERTMESH_CLUSTER"


def running(marker: str) -> list[psutil.Process]:
    """The live processes that carry `marker`, whatever became of their parents."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == marker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return [process for process in found if process.pid != os.getpid()]


def end(marker: str, grace_s: float) -> None:
    """Asks the cluster's processes to end, waits up to `grace_s` and kills what is left.

    `ray start --block`, the oldest, ends the others in order; what outlives it is asked by itself.
    """
    processes = running(marker)
    if processes:
        eldest = min(processes, key=lambda process: (process.create_time(), process.pid))
        _signal([eldest], kill=False)
        _, rest = psutil.wait_procs(processes, timeout=grace_s)
        _signal(rest, kill=False)
        psutil.wait_procs(rest, timeout=2)
    while rest := running(marker):
        _signal(rest, kill=True)
        psutil.wait_procs(rest, timeout=2)


def _signal(processes: list[psutil.Process], *, kill: bool) -> None:
    for process in processes:
        try:
            process.kill() if kill else process.terminate()
        except psutil.NoSuchProcess:
            continue
