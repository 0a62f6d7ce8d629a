from __future__ import annotations

from expertmesh.v1 import expert_pb2 as pb
from expertmesh.wire.status import code_name


def test_a_code_that_the_protocol_does_not_know_has_a_name_too() -> None:
    assert code_name(pb.CODE_INTERNAL) == "CODE_INTERNAL"
    from_the_wire = pb.Status.FromString(b"\x08\x63")
    assert code_name(from_the_wire.code) == "code 99"
