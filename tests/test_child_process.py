"""Ctrl-C and processes of one's own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import pytest

from expertmesh.child_process import spawn


class Interrupting:
    """Ctrl-C while a process that gets this one starts."""

    def __reduce__(self) -> tuple[type[str], tuple[()]]:
        os.kill(os.getpid(), signal.SIGINT)
        return str, ()


def _answer(connection: Connection, *_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    connection.send("still here")
    connection.recv()


def test_ctrl_c_is_for_the_one_that_started_it() -> None:
    process, connection = spawn(_answer, name="deaf")
    assert connection.poll(60) and connection.recv() == "still here"
    connection.close()
    process.kill()
    process.join()


def test_ctrl_c_while_it_starts_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt):
        spawn(_answer, Interrupting(), name="interrupted")
    for process in multiprocessing.active_children():
        if process.name == "interrupted":
            process.kill()
            process.join()
