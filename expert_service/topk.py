"""Ragged (row, expert) pairs as dense [R, K] tables, which fused kernels want; K may be 1, each pair a row of its own.

A row with fewer than K pairs is filled up with its own first expert at weight 0: it adds nothing, and reads no weights
that are not read anyway. It is computed all the same: `pairs_per_read`, how many pairs an expert computes in the time
that telling rows of unlike numbers of pairs apart costs, decides when that is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy
import torch
from numpy.typing import NDArray

from expert_service.executor import Pairs
from expertmesh.wire.tensors import WIRE_DTYPES

try:
    from expertmesh_native import fill_table, spread_pairs, sum_pairs
except ImportError:
    fill_table = spread_pairs = sum_pairs = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Table:
    """K slots of experts for each of some rows, ascending in each."""

    rows: NDArray[numpy.int64] | None
    """[R] of the batch, or None: all of them, in order."""
    slots: NDArray[numpy.int32]
    """[R, K]"""
    weights: NDArray[numpy.float32]
    """[R, K]"""

    def parts(self, max_pairs: int) -> Iterator[Table]:
        """In pieces of at most `max_pairs` pairs, or one row."""
        count, width = self.slots.shape
        step = max(1, max_pairs // width)
        if count <= step:
            yield self
            return
        rows = numpy.arange(count) if self.rows is None else self.rows
        for start in range(0, count, step):
            piece = slice(start, start + step)
            yield Table(rows[piece], self.slots[piece], self.weights[piece])


class TableFiller:
    """Fills the one table that most batches are, in memory that the next one uses again; native where it can."""

    def __init__(self, max_pairs: int, pairs_per_read: int) -> None:
        self._capacity = max_pairs
        self._pairs_per_read = pairs_per_read
        self._ids = torch.empty(max_pairs, dtype=torch.int32)
        self._weights = torch.empty(max_pairs, dtype=torch.float32)
        self._addresses = self._ids.data_ptr(), self._weights.data_ptr()

    def fill(
        self, pairs: Pairs, slots: NDArray[numpy.int32], num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """ids [R, K] int32 and weights [R, K] of all rows, in order; None where `tables` is to be asked."""
        if fill_table is None:
            return None
        width = fill_table(
            pairs.rows, pairs.experts, pairs.weights, slots, num_rows,
            self._pairs_per_read, self._capacity, *self._addresses,
        )  # fmt: skip
        if not width:
            return None
        shape, strides = (num_rows, width), (width, 1)
        return self._ids.as_strided(shape, strides), self._weights.as_strided(shape, strides)


class PairSpreader:
    """Pairs as rows of their own, by row and ascending expert, in memory that the next ones use again. By native code
    alone: what `fits` is asked for."""

    def __init__(self, max_pairs: int, hidden_size: int, dtype: torch.dtype) -> None:
        self._capacity = max_pairs
        self._rows = torch.empty(max_pairs, dtype=torch.int32)
        self._ids = torch.empty(max_pairs, 1, dtype=torch.int32)
        self._weights = torch.empty(max_pairs, 1, dtype=torch.float32)
        self._x = torch.empty(max_pairs, hidden_size, dtype=dtype)
        self._addresses = tuple(each.data_ptr() for each in (self._rows, self._ids, self._weights, self._x))

    def fits(self, pairs: Pairs) -> bool:
        """Whether `spread` and `sum` may be called for them."""
        return spread_pairs is not None and 0 < len(pairs.rows) <= self._capacity

    def spread(
        self, pairs: Pairs, slots: NDArray[numpy.int32], x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of x [P, H], ids [P, 1] int32 and weights [P, 1], of pairs that fit and contiguous x [R, H]."""
        spread_pairs(
            pairs.rows, pairs.experts, pairs.weights, slots, len(x), x.data_ptr(), x.shape[1] * x.itemsize,
            *self._addresses,
        )  # fmt: skip
        count = len(pairs.rows)
        return self._x[:count], self._ids[:count], self._weights[:count]

    def sum(self, outputs: torch.Tensor, num_rows: int) -> torch.Tensor:
        """[num_rows, H]: outputs [P, H] of the pairs that were spread last, summed up by row in fp32, rounded once."""
        sums = torch.empty(num_rows, outputs.shape[1], dtype=outputs.dtype)
        sum_pairs(
            len(outputs), outputs.shape[1], WIRE_DTYPES[outputs.dtype], self._addresses[0], outputs.data_ptr(),
            num_rows, sums.data_ptr(),
        )  # fmt: skip
        return sums


def tables(pairs: Pairs, slots: NDArray[numpy.int32], num_rows: int, pairs_per_read: int) -> list[Table]:
    """The pairs of a batch of num_rows rows, experts as slots[expert]; each row that has pairs stands in one table."""
    count = len(pairs.rows)
    if not count:
        return []
    order = numpy.lexsort((pairs.experts, pairs.rows))
    experts, weights = slots[pairs.experts[order]], pairs.weights[order]
    pairs_of_row = numpy.bincount(pairs.rows, minlength=num_rows)
    width = int(pairs_of_row.max())
    if width * num_rows == count:
        return [Table(None, experts.reshape(num_rows, width), weights.reshape(num_rows, width))]
    starts = numpy.cumsum(pairs_of_row) - pairs_of_row
    return [
        _fill(None if len(rows) == num_rows else rows, starts[rows], pairs_of_row[rows], experts, weights)
        for rows in _classes(pairs_of_row, pairs.experts, pairs_per_read)
    ]


def _classes(
    pairs_of_row: NDArray[numpy.int64], experts: NDArray[numpy.int32], pairs_per_read: int
) -> list[NDArray[numpy.int64]]:
    """Rows that go together: those of like numbers of pairs, where the filling saved is worth reading weights again."""
    busy = numpy.flatnonzero(pairs_of_row)
    width = int(pairs_of_row.max())
    if width * len(busy) - len(experts) <= pairs_per_read:
        return [busy]
    rows_with = numpy.bincount(pairs_of_row, minlength=width + 1)
    widths = cheapest_widths(rows_with.tolist(), pairs_per_read * len(numpy.unique(experts)))
    return [
        numpy.flatnonzero((pairs_of_row > below) & (pairs_of_row <= width))
        for below, width in zip([0, *widths], widths, strict=False)
    ]


def cheapest_widths(rows_with: list[int], read: int) -> list[int]:
    """Widths of the cheapest tables for rows_with[k] rows of k pairs, ascending; the last is the largest k.

    A table costs its pairs, filling included, and `read`.
    """
    rows_up_to = list(accumulate(rows_with[1:], initial=0))
    cheapest: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for width in (width for width, rows in enumerate(rows_with) if width and rows):
        cheapest[width] = min(
            (cost + read + width * (rows_up_to[width] - rows_up_to[below]), [*widths, width])
            for below, (cost, widths) in cheapest.items()
        )
    return cheapest[len(rows_with) - 1][1]


def _fill(
    rows: NDArray[numpy.int64] | None,
    starts: NDArray[numpy.int64],
    counts: NDArray[numpy.int64],
    experts: NDArray[numpy.int32],
    weights: NDArray[numpy.float32],
) -> Table:
    column = numpy.arange(int(counts.max()))
    present = column < counts[:, None]
    source = numpy.where(present, starts[:, None] + column, starts[:, None])
    return Table(rows, experts[source], numpy.where(present, weights[source], numpy.float32(0)))
