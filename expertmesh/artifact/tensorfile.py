"""safetensors files read and written piece by piece, so that no file need fit into memory.

The format: a little-endian u64 length, that many bytes of JSON (name -> dtype, shape, [begin, end) within the data),
the data without gaps. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from expertmesh.errors import ArtifactError

MAX_HEADER_BYTES = 100 * 2**20
BLOCK_BYTES = 4 * 2**20
ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FLOAT_CODES = {dtype: code for code, dtype in FLOAT_DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its dtype by safetensors' code, its shape, and where its bytes are in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file; raises ArtifactError that names it where it is truncated or corrupt."""
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > MAX_HEADER_BYTES or 8 + length > total:
                raise ArtifactError(f"{path}: truncated or not a safetensors file ({total} bytes)")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {str(name): _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: corrupt header ({error})") from None
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.size)):
        if entry.offset != end:
            raise ArtifactError(f"{path}: corrupt header (tensors overlap or leave a gap at byte {end})")
        end += entry.size
    if end != total:
        raise ArtifactError(
            f"{path}: {'truncated' if end > total else 'corrupt'}: {total} bytes, its header says {end}"
        )
    return entries


def _entry(path: Path, name: str, fields: dict[str, object], base: int) -> TensorEntry:
    dtype, shape, span = str(fields["dtype"]), fields["shape"], fields["data_offsets"]
    if not isinstance(shape, list) or not isinstance(span, list):
        raise ValueError(f"{name}: shape and data_offsets must be lists")
    begin, end = (int(offset) for offset in span)
    if dtype not in ITEM_BITS:
        raise ArtifactError(f"{path}: {name}: unknown dtype {dtype}")
    if (end - begin) * 8 != math.prod(shape) * ITEM_BITS[dtype]:
        raise ArtifactError(f"{path}: corrupt header ({name}: {dtype} {shape} in {end - begin} bytes)")
    return TensorEntry(path, dtype, tuple(int(size) for size in shape), base + begin, end - begin)


def read_tensor(entry: TensorEntry, first: int = 0, count: int | None = None) -> torch.Tensor:
    """Rows `first` to `first + count` along the first dimension (all by default) in memory of their own.

    The dtype is one of FLOAT_DTYPES.
    """
    rows = entry.shape[0] if count is None else count
    row_bytes = entry.size // entry.shape[0]
    buffer = torch.empty(rows * row_bytes, dtype=torch.uint8)
    with entry.path.open("rb") as file:
        file.seek(entry.offset + first * row_bytes)
        if file.readinto(buffer.numpy().data) != rows * row_bytes:
            raise ArtifactError(f"{entry.path}: truncated while it was read")
    return buffer.view(FLOAT_DTYPES[entry.dtype]).view(rows, *entry.shape[1:])


def read_blocks(entry: TensorEntry) -> Iterator[bytes]:
    """The bytes of a tensor of any dtype, at most BLOCK_BYTES at a time."""
    with entry.path.open("rb") as file:
        file.seek(entry.offset)
        left = entry.size
        while left:
            block = file.read(min(left, BLOCK_BYTES))
            if not block:
                raise ArtifactError(f"{entry.path}: truncated while it was read")
            left -= len(block)
            yield block


class TensorFileWriter:
    """Writes a safetensors file in order, under a temporary name until `commit`.

    The file has its full size from the start, so that a full disk shows at once and what is written can be read back
    through `partial`. Left without a commit, it is removed.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """`tensors`: name -> dtype code and shape, in the order in which their bytes will be written."""
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        header = _header(tensors)
        self._expected = len(header) + sum(_size(*tensor) for tensor in tensors.values())
        self._written = 0
        self._digest = hashlib.sha256()
        self._file = self.partial.open("wb")
        try:
            os.posix_fallocate(self._file.fileno(), 0, self._expected)
            self.write([header])
        except BaseException:
            self._discard()
            raise

    def write(self, blocks: Iterable[bytes | memoryview]) -> None:
        """Appends raw bytes and flushes them."""
        for block in blocks:
            self._file.write(block)
            self._digest.update(block)
            self._written += len(block)
        self._file.flush()

    def write_tensor(self, tensor: torch.Tensor) -> None:
        self.write([tensor.contiguous().view(-1).view(torch.uint8).numpy().data])

    def commit(self) -> str:
        """Gives the file its name, once all of it is on disk, and returns its sha256."""
        assert self._written == self._expected, f"{self.path}: wrote {self._written} of {self._expected} bytes"
        os.fsync(self._file.fileno())
        self._file.close()
        self.partial.rename(self.path)
        return self._digest.hexdigest()

    def _discard(self) -> None:
        self._file.close()
        self.partial.unlink(missing_ok=True)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._file.closed:
            self._discard()


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_BITS[dtype] // 8


def _header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + _size(dtype, shape)]}
        offset += _size(dtype, shape)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the data begins on a cache line
    return len(text).to_bytes(8, "little") + text


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
