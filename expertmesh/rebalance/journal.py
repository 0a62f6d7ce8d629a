"""What a rebalance has done so far, on disk, so that one that was killed can be continued or undone."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pydantic

from expertmesh.config import Section
from expertmesh.errors import ClusterError
from expertmesh.rebalance.change import Groups
from expertmesh.rebalance.steps import Step

JOURNAL_FILE, LAST_FILE, LOCK_FILE = "rebalance.json", "rebalance-last.json", "rebalance.lock"


class Journal(Section):
    plan: str
    """Where the plan came from."""
    source_before: str
    """Where the groups before came from."""
    started_at: float
    """Unix time, seconds."""
    direction: Literal["forward", "back"] = "forward"
    before: Groups
    """What ran when it began, to which a roll-back returns."""
    after: Groups
    replicas: dict[str, int] = {}
    """With how many a group starts: what the plan expects it to need, and what ran before."""
    steps: tuple[Step, ...]
    done: int = 0
    """Steps that are over."""
    distrusted: tuple[str, ...] = ()
    """Groups with which no other may be compared: they failed their own verification."""
    reason: str = ""
    """Why it goes back."""
    ended_at: float | None = None

    @property
    def target(self) -> Groups:
        return self.after if self.direction == "forward" else self.before


class JournalFile:
    """In a cluster's state directory, which must be there: a cluster that has been stopped has none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> Journal | None:
        """The one that is not over, if there is one."""
        return self._read(JOURNAL_FILE)

    def last(self) -> Journal | None:
        """The last one that is over, whether it went back or not."""
        return self._read(LAST_FILE)

    def write(self, journal: Journal) -> None:
        write_text(self._folder / JOURNAL_FILE, journal.model_dump_json(indent=1))

    def close(self, journal: Journal) -> None:
        """It is over."""
        write_text(self._folder / LAST_FILE, journal.model_dump_json(indent=1))
        self.drop()

    def drop(self) -> None:
        """Forgets the one that is not over."""
        (self._folder / JOURNAL_FILE).unlink(missing_ok=True)

    def _read(self, name: str) -> Journal | None:
        path = self._folder / name
        try:
            return Journal.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, pydantic.ValidationError) as error:
            raise ClusterError(f"{path}: not a rebalance's journal: {str(error).splitlines()[0]}") from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by one process at a time and given back when it ends, however it ends; raises ClusterError."""
        try:
            file = os.open(self._folder / LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ClusterError(f"{self._folder / LOCK_FILE}: {(error.strerror or str(error)).lower()}") from None
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ClusterError(f"another rebalance of {self._folder.name} is under way") from None
            yield
        finally:
            os.close(file)


def write_text(path: Path, text: str) -> None:
    """All of it or nothing, on disk when it returns; raises ClusterError where the folder is gone."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with partial.open("w") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except FileNotFoundError:
        raise ClusterError(f"{path.parent}: is gone; has the cluster been stopped?") from None
    except OSError as error:
        raise ClusterError(f"{path}: {(error.strerror or str(error)).lower()}") from None
