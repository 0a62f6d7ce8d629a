from __future__ import annotations

from itertools import combinations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from marks import needs_native

from expert_service.executor import Pairs
from expert_service.topk import PairSpreader, Table, TableFiller, cheapest_widths, tables

SLOTS = numpy.arange(8, dtype=numpy.int32)
READ = 48
columns = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.floats(0.5, 2, width=32)), max_size=40)
every_row = columns.map(lambda asked: [*((row, row % 6, 1.0) for row in range(10)), *asked])


def as_pairs(asked: list[tuple[int, int, float]]) -> Pairs:
    rows, experts, weights = ([pair[i] for pair in asked] for i in range(3))
    return Pairs(numpy.array(rows, numpy.int32), numpy.array(experts, numpy.int32), numpy.array(weights, numpy.float32))


def listed(found: list[Table], num_rows: int) -> list[tuple[int, int, float]]:
    """The pairs that tables hold; filling, which has weight 0, left out."""
    return [
        (int(row), int(expert), float(weight))
        for table in found
        for row, experts, weights in zip(
            range(num_rows) if table.rows is None else table.rows, table.slots, table.weights, strict=True
        )
        for expert, weight in zip(experts, weights, strict=True)
        if weight
    ]


@pytest.mark.parametrize("pairs_per_read", [0, 48])
@given(asked=columns)
def test_tables_hold_the_pairs_each_row_in_one_table_by_ascending_expert(
    pairs_per_read: int, asked: list[tuple[int, int, float]]
) -> None:
    found = tables(as_pairs(asked), SLOTS, 10, pairs_per_read)
    assert sorted(listed(found, 10)) == sorted(asked)
    rows = [row for table in found for row in (range(10) if table.rows is None else table.rows.tolist())]
    assert sorted(rows) == sorted({row for row, _, _ in asked})
    for table in found:
        for experts, weights in zip(table.slots, table.weights, strict=True):
            own = experts[weights > 0]
            assert (numpy.diff(own) >= 0).all()
            assert (weights[: len(own)] > 0).all() and (experts[len(own) :] == experts[0]).all()


@given(asked=columns, max_pairs=st.integers(1, 12))
def test_parts_hold_what_the_table_holds(asked: list[tuple[int, int, float]], max_pairs: int) -> None:
    found = tables(as_pairs(asked), SLOTS, 10, READ)
    parts = [part for table in found for part in table.parts(max_pairs)]
    assert listed(parts, 10) == listed(found, 10)
    assert all(part.slots.size <= max_pairs or len(part.slots) == 1 for part in parts)


@given(rows_with=st.lists(st.integers(0, 30), min_size=1, max_size=7), read=st.integers(0, 60))
def test_widths_are_the_cheapest_of_all(rows_with: list[int], read: int) -> None:
    rows_with = [0, *rows_with, 1]
    widest = len(rows_with) - 1

    def cost(widths: tuple[int, ...]) -> int:
        cuts = [*widths, widest]
        rows = [sum(rows_with[low + 1 : high + 1]) for low, high in zip([0, *cuts], cuts, strict=False)]
        return sum(read + width * count for width, count in zip(cuts, rows, strict=True))

    present = [width for width in range(1, widest) if rows_with[width]]
    options = [cut for size in range(len(present) + 1) for cut in combinations(present, size)]
    found = cheapest_widths(rows_with, read)
    assert found[-1] == widest and cost(tuple(found[:-1])) == min(map(cost, options))


def test_rows_of_very_different_numbers_of_pairs_are_told_apart_where_it_saves_more_than_a_read() -> None:
    rows = numpy.arange(2000, dtype=numpy.int32)
    many = numpy.repeat(numpy.arange(100, dtype=numpy.int32), 7)
    experts = numpy.concatenate([rows % 8, numpy.tile(numpy.arange(7, dtype=numpy.int32), 100)])
    pairs = Pairs(numpy.concatenate([rows, many]), experts, numpy.ones(len(experts), numpy.float32))
    assert [table.slots.shape for table in tables(pairs, SLOTS, 2000, READ)] == [(1900, 1), (100, 8)]
    assert [table.slots.shape for table in tables(pairs.part(1950, 2100), SLOTS, 2000, READ)] == [(65, 7)]


@needs_native
@given(asked=st.one_of(columns, every_row), num_rows=st.integers(10, 11))
def test_the_native_filler_makes_the_same_table(asked: list[tuple[int, int, float]], num_rows: int) -> None:
    pairs = as_pairs(asked)
    held = numpy.array([0, -1, 1, 2, -1, 3, -1, 4, 5, -1, 6, 7], dtype=numpy.int32)
    pairs = Pairs(pairs.rows, numpy.flatnonzero(held >= 0).astype(numpy.int32)[pairs.experts], pairs.weights)
    found = TableFiller(64, READ).fill(pairs, held, num_rows)
    expected = tables(pairs, held, num_rows, READ)
    if found is None:
        one_table = len(expected) == 1 and expected[0].rows is None and expected[0].slots.size <= 64
        assert not one_table
        return
    assert len(expected) == 1 and expected[0].rows is None
    assert numpy.array_equal(found[0].numpy(), expected[0].slots)
    assert numpy.array_equal(found[1].numpy(), expected[0].weights)


@needs_native
@pytest.mark.parametrize(("row", "expert"), [(-1, 0), (1, 0), (0, -1), (0, 8), (0, 3)])
def test_the_native_filler_refuses_what_is_not_there(row: int, expert: int) -> None:
    held = numpy.where(SLOTS == 3, -1, SLOTS).astype(numpy.int32)
    asked = as_pairs([(0, 0, 1.0), (row, expert, 1.0)])
    with pytest.raises(IndexError, match="not there"):
        TableFiller(64, READ).fill(asked, held, 1)
    with pytest.raises(IndexError, match="not there"):
        PairSpreader(64, 4, torch.float32).spread(asked, held, torch.zeros(1, 4))


@needs_native
@given(asked=columns)
def test_spread_pairs_are_rows_of_their_own_in_order_and_sum_up_by_row(asked: list[tuple[int, int, float]]) -> None:
    x = torch.arange(40.0).view(10, 4)
    spreader = PairSpreader(64, 4, torch.float32)
    rows, ids, weights = spreader.spread(as_pairs(asked), SLOTS, x)
    order = sorted(range(len(asked)), key=lambda pair: asked[pair][:2])
    assert ids[:, 0].tolist() == [asked[pair][1] for pair in order]
    assert weights[:, 0].tolist() == [asked[pair][2] for pair in order]
    assert torch.equal(rows, x[[asked[pair][0] for pair in order]])
    expected = torch.zeros(10, 4)
    for pair in order:
        expected[asked[pair][0]] += x[asked[pair][0]] * asked[pair][2]
    assert torch.equal(spreader.sum(rows * weights, 10), expected)


@needs_native
def test_more_pairs_than_the_spreader_holds_do_not_fit() -> None:
    assert PairSpreader(2, 4, torch.float32).fits(as_pairs([(0, 0, 1.0), (0, 1, 1.0)]))
    assert not PairSpreader(1, 4, torch.float32).fits(as_pairs([(0, 0, 1.0), (0, 1, 1.0)]))
