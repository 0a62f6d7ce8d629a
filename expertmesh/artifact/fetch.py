"""`python -m expertmesh.artifact.fetch URI DST`: a checkpoint from an object store (s3://, gs://) to a directory."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pyarrow
from pyarrow import fs

from expertmesh.errors import ArtifactError, ExpertMeshError

STEP_BYTES = 8 * 2**20


def fetch(uri: str, destination: Path) -> int:
    """Copies all files below `uri` and returns their number; those that are there in full are left as they are.

    A file gets its name once it is complete. Raises ArtifactError with one line.
    """
    try:
        store, root = fs.FileSystem.from_uri(uri)
        files = [one for one in store.get_file_info(fs.FileSelector(root, recursive=True)) if one.is_file]
        if not files:
            raise ArtifactError(f"{uri}: no files there")
        for one in files:
            target = destination / Path(one.path).relative_to(root)
            if not (target.exists() and target.stat().st_size == one.size):
                print(f"{target}: {one.size / 2**20:.1f} MiB", file=sys.stderr, flush=True)
                _copy(store, one.path, target)
    except (OSError, pyarrow.ArrowException) as error:
        raise ArtifactError(f"{uri}: {' '.join(str(error).split())}") from None
    return len(files)


def _copy(store: fs.FileSystem, source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with store.open_input_stream(source) as reader, partial.open("wb") as writer:
        shutil.copyfileobj(reader, writer, STEP_BYTES)
    partial.replace(target)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m expertmesh.artifact.fetch URI DST")
    uri, destination = sys.argv[1], Path(sys.argv[2])
    try:
        count = fetch(uri, destination)
    except ExpertMeshError as error:
        sys.exit(f"fetch: {error}")
    print(f"{destination}: {count} files", file=sys.stderr)


if __name__ == "__main__":
    main()
