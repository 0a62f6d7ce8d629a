"""Typed tensors on the wire: torch tensors to and from `Tensor` messages."""

from __future__ import annotations

import warnings

import torch

from expertmesh.errors import WireError
from expertmesh.v1 import expert_pb2 as pb

DTYPES: dict[int, torch.dtype] = {
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
    pb.DTYPE_FLOAT16: torch.float16,
    pb.DTYPE_INT32: torch.int32,
}
WIRE_DTYPES: dict[torch.dtype, pb.DType.ValueType] = {dtype: pb.DType.ValueType(wire) for wire, dtype in DTYPES.items()}

# decode's tensors are only read, so torch need not warn that their bytes are not writable
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def encode(tensor: torch.Tensor) -> pb.Tensor:
    """A [rows, width] or [rows] tensor as a message, copied once. The host is little-endian."""
    rows = tensor.shape[0]
    width = tensor.shape[1] if tensor.dim() == 2 else 1
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return pb.Tensor(dtype=WIRE_DTYPES[tensor.dtype], rows=rows, width=width, data=data)


def decode(message: pb.Tensor, name: str = "tensor") -> torch.Tensor:
    """The [rows, width] tensor of a message, over its bytes as protobuf hands them out; must not be written to.

    Raises WireError where the type is unknown or the bytes are not rows * width elements.
    """
    dtype = DTYPES.get(message.dtype)
    if dtype is None:
        raise WireError(f"{name}: unknown dtype {message.dtype}")
    data = message.data  # protobuf copies it each time
    expected = message.rows * message.width * dtype.itemsize
    if len(data) != expected:
        raise WireError(f"{name}: {message.rows} x {message.width} {dtype} takes {expected} bytes, got {len(data)}")
    if not expected:
        return torch.empty(message.rows, message.width, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(message.rows, message.width)
