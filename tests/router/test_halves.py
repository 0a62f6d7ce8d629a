"""Two halves take turns: of every layer the first is computed before the second, and neither waits for the other's
rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from router_service.halves import Turns, away

PATIENCE_S = 20.0
LAYERS = 4


class Halves:
    """Runs a function of the half in two threads and keeps what each noted, in order."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.noted: list[str] = []

    def run(self, compute: Callable[[int], None]) -> list[BaseException | None]:
        def one(half: int) -> None:
            with self.turns.of(half, lambda: self.noted.append(f"begin {half}")):
                compute(half)

        with ThreadPoolExecutor(2) as pool:
            # the second first: it waits for its turn
            under_way = [pool.submit(one, half) for half in (1, 0)]
            return [future.exception(PATIENCE_S) for future in reversed(under_way)]

    def layers(self, half: int) -> None:
        for layer in range(LAYERS):
            self.noted.append(f"{half} computes {layer}")
            with away():
                pass


def test_of_every_layer_the_first_half_is_computed_before_the_second() -> None:
    halves = Halves()
    assert halves.run(halves.layers) == [None, None]
    computed = [note for note in halves.noted if "computes" in note]
    assert computed == [f"{half} computes {layer}" for layer in range(LAYERS) for half in (0, 1)]
    assert halves.noted[:4] == ["begin 0", "0 computes 0", "begin 1", "1 computes 0"]


def test_one_computes_while_the_rows_of_the_other_are_away() -> None:
    """Each waits, with its rows away, for what the other does meanwhile."""
    halves, computed = Halves(), [threading.Event(), threading.Event()]

    def compute(half: int) -> None:
        if half == 0:
            with away():
                assert computed[1].wait(PATIENCE_S)
            computed[0].set()
        else:
            computed[1].set()
            with away():
                assert computed[0].wait(PATIENCE_S)

    assert halves.run(compute) == [None, None]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_half_that_fails_does_not_hold_up_the_other(broken: int) -> None:
    halves = Halves()

    def compute(half: int) -> None:
        if half == broken:
            with away():
                raise ValueError("no experts")
        halves.layers(half)

    failures = halves.run(compute)
    assert isinstance(failures[broken], ValueError)
    assert failures[1 - broken] is None
    assert f"{1 - broken} computes {LAYERS - 1}" in halves.noted


def test_a_thread_that_computes_no_half_waits_for_nobody() -> None:
    with away():
        pass
