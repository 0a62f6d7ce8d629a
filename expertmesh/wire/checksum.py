"""The checksum of a dispatch and of its answer: CRC-32 over what decides about the sums, as expert.proto says."""

from __future__ import annotations

import struct
import zlib

from expertmesh.v1 import expert_pb2 as pb

REQUEST_CHANGED = "the request's checksum differs: bytes changed on the way"
REQUEST, ANSWER, TENSOR = struct.Struct("<QQII"), struct.Struct("<QI"), struct.Struct("<III")
UINT32 = 2**32 - 1


def request_checksum(request: pb.DispatchRequest) -> int:
    """Whatever checksum the request has."""
    head = request.id, request.timeout_us, request.layer, request.output_dtype & UINT32
    so_far = zlib.crc32(REQUEST.pack(*head))
    for tensor in (request.hidden_states, request.pair_rows, request.pair_experts, request.pair_weights):
        so_far = _add(tensor, so_far)
    return so_far


def answer_checksum(answer: pb.DispatchResponse) -> int:
    """Whatever checksum the answer has."""
    return _add(answer.output, zlib.crc32(ANSWER.pack(answer.id, answer.status.code & UINT32)))


def find_change(answer: pb.DispatchResponse) -> str:
    """What is wrong with an answer's checksum; empty: nothing."""
    if not answer.HasField("checksum"):
        return "answered without a checksum"
    changed = answer.checksum != answer_checksum(answer)
    return "the answer's checksum differs: bytes changed on the way" if changed else ""


def _add(tensor: pb.Tensor, so_far: int) -> int:
    so_far = zlib.crc32(TENSOR.pack(tensor.dtype & UINT32, tensor.rows, tensor.width), so_far)
    return zlib.crc32(tensor.data, so_far)
