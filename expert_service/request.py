"""What a dispatch must look like before it may wait: hostile input ends here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from expert_service.batcher import Caller, Job
from expert_service.executor import Pairs
from expertmesh.errors import WireError
from expertmesh.experts import format_indices
from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.channel import MAX_MESSAGE_BYTES
from expertmesh.wire.checksum import REQUEST_CHANGED, request_checksum
from expertmesh.wire.tensors import DTYPES, decode

MAX_ROWS = 8192
ROW_DTYPES = frozenset({pb.DTYPE_FLOAT32, pb.DTYPE_BFLOAT16, pb.DTYPE_FLOAT16})


class Refusal(Exception):
    """A request that is answered with a status of its own; the stream lives on."""

    def __init__(self, code: pb.Code.ValueType, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Served:
    """What requests may ask for."""

    hidden_size: int
    held: dict[int, NDArray[numpy.bool_]]
    """MoE layer -> [E], true where the expert is held."""
    max_rows: int
    max_pairs: int


def max_rows(hidden_size: int, top_k: int, max_queued_rows: int) -> int:
    """Rows that one request may hold: what fits a message in fp32 with its pairs, and what may wait at all."""
    bytes_per_row = 4 * hidden_size + 12 * top_k
    return max(1, min(MAX_ROWS, max_queued_rows, (MAX_MESSAGE_BYTES - 4096) // bytes_per_row))


def parse(request: pb.DispatchRequest, served: Served, caller: Caller, now: float) -> Job:
    """The job that a request asks for, reading its bytes in place; raises Refusal."""
    checked = request.HasField("checksum")
    if checked and request.checksum != request_checksum(request):
        raise Refusal(pb.CODE_DATA_LOSS, REQUEST_CHANGED)
    held = served.held.get(request.layer)
    if held is None:
        layers = format_indices(set(served.held))
        raise Refusal(pb.CODE_NOT_FOUND, f"layer {request.layer} is not served here (layers: {layers})")
    if request.output_dtype not in ROW_DTYPES:
        raise _invalid(f"output_dtype {request.output_dtype} is no floating-point type")
    try:
        hidden_states = decode(request.hidden_states, "hidden_states")
    except WireError as error:
        raise _invalid(str(error)) from None
    rows, width = hidden_states.shape
    if request.hidden_states.dtype not in ROW_DTYPES:
        raise _invalid("hidden_states: INT32 is no floating-point type")
    if width != served.hidden_size:
        raise _invalid(f"hidden_states: width {width}, the model's hidden size is {served.hidden_size}")
    if rows > served.max_rows:
        raise _invalid(f"hidden_states: {rows} rows, at most {served.max_rows} are accepted")
    return Job(
        caller=caller,
        request_id=request.id,
        layer=request.layer,
        hidden_states=hidden_states,
        pairs=_parse_pairs(request, rows, held, served.max_pairs),
        output_dtype=DTYPES[request.output_dtype],
        arrived_at=now,
        deadline=now + request.timeout_us * 1e-6 if request.timeout_us else float("inf"),
        checked=checked,
    )


def _parse_pairs(request: pb.DispatchRequest, rows: int, held: NDArray[numpy.bool_], max_pairs: int) -> Pairs:
    pairs = Pairs(
        rows=_column(request.pair_rows, pb.DTYPE_INT32, numpy.int32, "pair_rows"),
        experts=_column(request.pair_experts, pb.DTYPE_INT32, numpy.int32, "pair_experts"),
        weights=_column(request.pair_weights, pb.DTYPE_FLOAT32, numpy.float32, "pair_weights"),
    )
    count = len(pairs.rows)
    if not count == len(pairs.experts) == len(pairs.weights):
        lengths = f"{count}, {len(pairs.experts)} and {len(pairs.weights)}"
        raise _invalid(f"pair_rows, pair_experts and pair_weights have {lengths} rows")
    if count > max_pairs:
        raise _invalid(f"{count} pairs, at most {max_pairs} are accepted")
    if not count:
        return pairs
    if pairs.rows.min() < 0 or pairs.rows.max() >= rows:
        raise _invalid(f"pair_rows: {pairs.rows.min()} to {pairs.rows.max()}, but hidden_states has {rows} rows")
    if pairs.experts.min() < 0:
        raise _invalid(f"pair_experts: expert {pairs.experts.min()} cannot exist")
    if pairs.experts.max() >= len(held) or not held[pairs.experts].all():
        absent = sorted({int(e) for e in numpy.unique(pairs.experts) if e >= len(held) or not held[e]})
        raise Refusal(pb.CODE_NOT_FOUND, f"layer {request.layer}: expert {absent[0]} is not held here")
    return pairs


def _column(message: pb.Tensor, dtype: pb.DType.ValueType, element: type[Any], name: str) -> NDArray[Any]:
    if message.dtype != dtype:
        raise _invalid(f"{name}: dtype {message.dtype}, {pb.DType.Name(dtype)} is expected")
    if message.width != 1 or len(message.data) != 4 * message.rows:
        raise _invalid(
            f"{name}: {message.rows} x {message.width} in {len(message.data)} bytes is no column of 4-byte elements"
        )
    return numpy.frombuffer(message.data, dtype=element)


def _invalid(message: str) -> Refusal:
    return Refusal(pb.CODE_INVALID_ARGUMENT, message)
