"""Statuses in band: what a replica answers about one dispatch."""

from __future__ import annotations

from expertmesh.v1 import expert_pb2 as pb


def code_name(code: int) -> str:
    """As the protocol names it, or its number: a replica may answer any."""
    return pb.Code.Name(pb.Code.ValueType(code)) if code in pb.Code.values() else f"code {code}"
