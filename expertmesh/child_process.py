"""Processes of one's own on this machine, each at the other end of a pipe."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


def spawn(work: Callable[..., None], *args: Any, name: str) -> tuple[BaseProcess, Connection]:
    """A new interpreter that runs `work(connection, *args)`; ends with this process. Ctrl-C is for this process, which
    tells the other what to do."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *args), name=name, daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if _in_main_thread() else None
    try:
        process.start()
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
        theirs.close()
    return process, ours


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
