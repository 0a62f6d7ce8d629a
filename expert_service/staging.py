"""Copies between host and GPU through pinned memory, which does not block the thread until the answer is needed.

torch keeps pinned blocks for the next use, and none is used again before the copies that read it are done. On other
devices these are plain copies.
"""

from __future__ import annotations

import numpy
import torch
from numpy.typing import NDArray


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that is enqueued on the current stream; `tensor` may be written again at once."""
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor)
    return pinned.to(device, non_blocking=True)


def columns_to_device(columns: list[NDArray[numpy.int32]], device: torch.device) -> list[torch.Tensor]:
    """Several columns in one copy."""
    joined = to_device(torch.from_numpy(numpy.concatenate(columns)), device)
    return list(torch.split(joined, [len(column) for column in columns]))


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """In host memory and complete: waits for the current stream, and for nothing else."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return pinned
