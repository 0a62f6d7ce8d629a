"""Processes of one's own on this machine, each at the other end of a pipe."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


def spawn(work: Callable[..., None], *args: Any, name: str) -> tuple[BaseProcess, Connection]:
    """A new interpreter that runs `work(connection, *args)`; ends with this process. Ctrl-C is for this process, which
    tells the other what to do; one that comes while the other starts comes through after that."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *args), name=name, daemon=True)
    resource_tracker.ensure_running()  # where it starts its own process, it unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        theirs.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process, ours
