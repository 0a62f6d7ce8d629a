"""Which files of an artifact are finished: how an interrupted `prepare` goes on."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydantic

from expertmesh.artifact.manifest import MANIFEST_FILE
from expertmesh.artifact.tensorfile import file_digest
from expertmesh.errors import ArtifactError

JOURNAL_FILE = ".prepare.json"


class Finished(pydantic.BaseModel, frozen=True, extra="forbid"):
    size: int
    sha256: str


class Journal(pydantic.BaseModel, extra="forbid"):
    """Stays in the finished artifact, where it tells the source and each file's digest."""

    identity: str
    """Of `Plan`."""
    files: dict[str, Finished] = {}
    """By the path within the artifact."""

    def add(self, artifact: Path, path: Path, sha256: str) -> None:
        self.files[str(path.relative_to(artifact))] = Finished(size=path.stat().st_size, sha256=sha256)
        self.save(artifact)

    def save(self, artifact: Path) -> None:
        write_text(artifact / JOURNAL_FILE, self.model_dump_json(indent=1))

    def is_finished(self, artifact: Path, path: Path) -> bool:
        """Whether the file is there with the bytes that were written."""
        known = self.files.get(str(path.relative_to(artifact)))
        return known is not None and _has_size(path, known.size) and file_digest(path) == known.sha256

    def is_complete(self, artifact: Path) -> bool:
        """Whether the manifest, which comes last, is there and every file has its size."""
        return (artifact / MANIFEST_FILE).is_file() and all(
            _has_size(artifact / name, known.size) for name, known in self.files.items()
        )


def open_journal(artifact: Path, identity: str) -> Journal:
    """The journal of `artifact`, new where there is nothing yet; raises ArtifactError where something else is there."""
    try:
        journal = Journal.model_validate_json((artifact / JOURNAL_FILE).read_bytes())
    except FileNotFoundError:
        if artifact.exists() and not (artifact.is_dir() and not any(artifact.iterdir())):
            raise ArtifactError(
                f"{artifact}: exists and was not made by `prepare` from this source; left as it is"
            ) from None
        return Journal(identity=identity)
    except NotADirectoryError:
        raise ArtifactError(f"{artifact}: exists and is no directory; left as it is") from None
    except pydantic.ValidationError:
        raise ArtifactError(f"{artifact / JOURNAL_FILE}: damaged; remove {artifact} to prepare it again") from None
    if journal.identity != identity:
        raise ArtifactError(
            f"{artifact}: exists and was made from another source or an older state of it; left as it is"
        )
    return journal


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds `directory` against another `prepare`; raises ArtifactError where one holds it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ArtifactError(f"{directory}: another `prepare` is writing it") from None
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
