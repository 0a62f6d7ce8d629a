"""What the controller plans by, without an API server."""

from __future__ import annotations

from pathlib import Path

from serve_configs import manifest, serve_text

from expertmesh.coverage import GIB
from expertmesh.kubernetes.controlled import read_config
from expertmesh.rebalance.planning import plan_for
from expertmesh.v1 import directory_pb2

EXPERT_BYTES = 2**20
MODEL = manifest(EXPERT_BYTES)


def largest(memory_gib: float | None) -> int:
    """Experts of the planned group that holds most, over all layers."""
    rows = [4000, 100, 100, 100, 100, 100, 100, 100]
    layers = [directory_pb2.LayerRows(layer=layer, experts=range(8), rows=rows) for layer in (0, 1)]
    seen = directory_pb2.ExpertLoadReply(fingerprint=MODEL.fingerprint, window_s=60, layers=layers)
    config = read_config(serve_text(), Path("/artifact"), memory_gib)
    groups = plan_for(seen, config, MODEL).plan.groups
    return max(sum(map(len, group.expert_sets(MODEL).values())) for group in groups)


def test_plans_keep_to_the_memory_that_is_given() -> None:
    assert largest(None) > 8
    assert largest(8 * EXPERT_BYTES / GIB) <= 8
