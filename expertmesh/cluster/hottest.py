"""Which experts got most rows and how evenly each layer's rows were shared, from the directory's counts."""

from __future__ import annotations

from expertmesh.cluster.status import ClusterStatus, Value
from expertmesh.v1 import directory_pb2


class HotExpert(Value):
    layer: int
    expert: int
    rows_per_s: float
    share: float
    """Of its layer's rows, 0 to 1."""


class LayerLoad(Value):
    layer: int
    rows_per_s: float
    """(row, expert) pairs."""
    balancedness: float | None
    """Mean over largest of the rows that each replica got over the last minute; 1: even. None: none got any."""


class Top(Value):
    cluster: ClusterStatus
    window_s: float
    """What the rates below cover, seconds."""
    experts: list[HotExpert]
    """Those with most rows first."""
    layers: list[LayerLoad]
    """The least even first."""


def top_of(cluster: ClusterStatus, load: directory_pb2.ExpertLoadReply, most: int) -> Top:
    """The `most` hottest experts and all layers."""
    seconds = max(load.window_s, 1.0)
    balance = {one.layer: round(one.balancedness, 4) for one in load.balance}
    layers, experts = [], []
    for layer in load.layers:
        total = sum(layer.rows)
        layers.append(
            LayerLoad(layer=layer.layer, rows_per_s=round(total / seconds, 1), balancedness=balance.get(layer.layer))
        )
        experts += [
            HotExpert(
                layer=layer.layer, expert=expert, rows_per_s=round(rows / seconds, 1), share=round(rows / total, 4)
            )
            for expert, rows in zip(layer.experts, layer.rows, strict=True)
            if rows
        ]
    experts.sort(key=lambda one: (-one.rows_per_s, one.layer, one.expert))
    layers.sort(key=lambda one: (1.0 if one.balancedness is None else one.balancedness, one.layer))
    return Top(cluster=cluster, window_s=round(load.window_s, 1), experts=experts[:most], layers=layers)
