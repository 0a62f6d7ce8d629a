"""Messages of synthetic dispatches: rows cut from a pool, pairs divided among replicas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from expertmesh.errors import ClusterError, ConfigError
from expertmesh.experts import format_indices, parse_indices
from expertmesh.v1 import directory_pb2
from expertmesh.v1 import expert_pb2 as pb
from loadtest.replica_link import ReplicaLink

POOL_ROWS = 1024
ITEM_BYTES = {pb.DTYPE_FLOAT32: 4, pb.DTYPE_BFLOAT16: 2, pb.DTYPE_FLOAT16: 2}
Indices = NDArray[numpy.int32]


@dataclass(frozen=True)
class Model:
    """What the replicas serve, as they say themselves."""

    hidden_size: int
    dtype: pb.DType.ValueType
    experts: dict[int, int]
    """MoE layer -> number of experts, for the layers that the run touches."""
    rows: bytes
    """POOL_ROWS rows of random hidden states, from which all messages are cut."""

    def hidden_states(self, rows: int) -> pb.Tensor:
        size = self.hidden_size * ITEM_BYTES[self.dtype]
        data = (self.rows * (rows // POOL_ROWS + 1))[: rows * size] if rows > POOL_ROWS else self.rows[: rows * size]
        return pb.Tensor(dtype=self.dtype, rows=rows, width=self.hidden_size, data=data)


def split(chosen: Indices, replicas: dict[int, ReplicaLink]) -> list[tuple[ReplicaLink, Indices]]:
    """Per replica the (row, expert) pairs [2, P] of its messages, none with more rows than it accepts."""
    links = list({id(link): link for link in replicas.values()}.values())
    number = {id(link): place for place, link in enumerate(links)}
    owner = numpy.full(int(chosen.max()) + 1, -1)
    for expert in numpy.unique(chosen).tolist():
        owner[expert] = number[id(replicas[expert])]
    owners = owner[chosen]
    parts: list[tuple[ReplicaLink, Indices]] = []
    for place, link in enumerate(links):
        mine = owners == place
        rows = numpy.flatnonzero(mine.any(axis=1))
        most = max(1, link.description.limits.max_rows)
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            row, column = numpy.nonzero(mine[part])
            parts.append((link, numpy.stack([row, chosen[part][row, column]]).astype(numpy.int32)))
    return parts


def request_for(model: Model, layer: int, pairs: Indices, timeout_s: float) -> pb.DispatchRequest:
    """The message of some (row, expert) pairs [2, P], rows numbered from 0 without gaps; every weight is 1/2."""
    count = pairs.shape[1]
    weights = numpy.full(count, 0.5, dtype=numpy.float32)
    rows = model.hidden_states(int(pairs[0].max()) + 1)
    return pb.DispatchRequest(
        layer=layer,
        hidden_states=rows,
        pair_rows=pb.Tensor(dtype=pb.DTYPE_INT32, rows=count, width=1, data=pairs[0].tobytes()),
        pair_experts=pb.Tensor(dtype=pb.DTYPE_INT32, rows=count, width=1, data=pairs[1].tobytes()),
        pair_weights=pb.Tensor(dtype=pb.DTYPE_FLOAT32, rows=count, width=1, data=weights.tobytes()),
        output_dtype=rows.dtype,
        timeout_us=int(timeout_s * 1e6),
    )


def random_rows(hidden_size: int, dtype: pb.DType.ValueType, seed: int) -> bytes:
    """POOL_ROWS rows of normally distributed values in the wire's type; raises ClusterError for an unknown one."""
    rows = numpy.random.default_rng(seed).normal(size=(POOL_ROWS, hidden_size)).astype("<f4")
    if dtype == pb.DTYPE_FLOAT32:
        return rows.tobytes()
    if dtype == pb.DTYPE_FLOAT16:
        return rows.astype("<f2").tobytes()
    if dtype == pb.DTYPE_BFLOAT16:  # its bits are the upper half of a float32's
        return rows.view("<u2")[:, 1::2].tobytes()
    raise ClusterError(f"replicas compute in a type that this client does not know: {dtype}")


def wanted_layers(table: directory_pb2.Table, layers: str | None) -> dict[int, int]:
    """Layer -> number of experts. Raises ConfigError where the run names a layer that is not served, ClusterError where
    replicas are of different models or an expert is served by none."""
    if len({replica.fingerprint for replica in table.replicas}) > 1:
        raise ClusterError("the directory lists replicas of different models")
    held: dict[int, set[int]] = {}
    for replica in table.replicas:
        for entry in replica.layers:
            held.setdefault(entry.layer, set()).update(entry.experts)
    wanted = set(held) if layers is None else set(parse_indices(layers, "expert_load.layers"))
    if unknown := wanted - held.keys():
        served = format_indices(set(held))
        raise ConfigError(f"expert_load.layers: {format_indices(unknown)} not served (MoE layers: {served})")
    counts = {layer: max(held[layer]) + 1 for layer in sorted(wanted)}
    for layer, count in counts.items():
        if missing := set(range(count)) - held[layer]:
            raise ClusterError(f"layer {layer}: no replica holds expert {format_indices(missing)}")
    return counts
