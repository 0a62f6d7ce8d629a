"""What traffic asks of each group: messages of router steps, as rows, pairs and experts that they touch; pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from expertmesh.simulation.layout import Layout

Floats = NDArray[numpy.float64]
MESSAGE_PAIRS = 5.0
"""A router divides a dispatch among so many replicas that each gets about as many pairs: what one more message costs in
`router_service.dispatch.choice`, and one more."""


@dataclass(frozen=True)
class Demand:
    """Of each group [G], per dispatch of one layer that reaches it at all; [P] are the layout's pairs."""

    dispatches_per_s: Floats
    rows: Floats
    pairs: Floats
    touched: Floats
    """Experts."""
    touch: Floats
    """[P] chance that such a dispatch has a row for the expert."""


@dataclass(frozen=True)
class Messages:
    """What reaches one group's replicas, once each dispatch is divided among them."""

    per_s: Floats
    rows: Floats
    pairs: Floats
    untouched: Floats
    """[P] logarithm of the chance that a message has no row for the expert."""


def demand(layout: Layout, tokens_per_s: float | Floats, chances: Floats, step_rows: int) -> Demand:
    """chances [P] that a row goes to this group for this expert; tokens_per_s, of all groups or of each [G].

    Rows choose independently of one another, layers of a group are alike.
    """
    chance = numpy.minimum(chances, 1 - 1e-12)
    steps_per_s = tokens_per_s / step_rows
    touch = -numpy.expm1(step_rows * numpy.log1p(-chance))
    per_row = layout.per_group(chance) / layout.layers
    pairs = step_rows * per_row
    rows = step_rows * -numpy.expm1(-per_row)
    reached = numpy.maximum(-numpy.expm1(-pairs), 1e-12)
    return Demand(
        dispatches_per_s=numpy.asarray(steps_per_s * layout.layers * reached),
        rows=rows / reached,
        pairs=pairs / reached,
        touched=layout.per_group(touch) / layout.layers / reached,
        touch=numpy.minimum(touch / reached[layout.group_of], 1 - 1e-12),
    )


def messages(layout: Layout, asked: Demand, running: Floats) -> Messages:
    """Divides each dispatch among replicas, by expert, as far as that leaves MESSAGE_PAIRS pairs in each message."""
    parts = numpy.clip(asked.pairs / MESSAGE_PAIRS, 1.0, numpy.maximum(1.0, numpy.minimum(running, asked.touched)))
    return Messages(
        per_s=asked.dispatches_per_s * parts,
        rows=asked.rows / parts,
        pairs=asked.pairs / parts,
        untouched=numpy.log1p(-asked.touch / parts[layout.group_of]),
    )


def shares_of(layout: Layout, running: Floats) -> Floats:
    """[P] of an expert's rows that go to each group with a copy: in proportion to running replicas."""
    if (layout.homes == 1).all():
        return numpy.ones(len(layout.pairs))
    mine = running[layout.group_of]
    total = numpy.bincount(layout.pairs, weights=mine)[layout.pairs]
    return numpy.where(total > 0, mine / numpy.maximum(total, 1e-12), 1 / layout.homes)
