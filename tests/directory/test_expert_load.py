from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping

import pytest

from expertmesh.directory.expert_load import MAX_EXPERTS, MAX_MODELS, SLICES, ExpertLoads
from expertmesh.errors import WireError
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import expert_pb2

Counts = Mapping[int, list[int]]


def replica(name: str, counts: Counts, rows_total: int | None = None, fingerprint: str = "f") -> pb.Replica:
    """Holds experts 0, 1, … of each layer."""
    explained = sum(max(rows) for rows in counts.values())
    return pb.Replica(
        replica_id=name,
        group=f"group of {name}",
        fingerprint=fingerprint,
        layers=[expert_pb2.LayerExperts(layer=layer, experts=range(len(rows))) for layer, rows in counts.items()],
        load=expert_pb2.Load(rows_total=explained if rows_total is None else rows_total),
    )


def rows_of(counts: Counts) -> list[pb.LayerRows]:
    return [pb.LayerRows(layer=layer, experts=range(len(rows)), rows=rows) for layer, rows in counts.items()]


def tell(loads: ExpertLoads, name: str, counts: Counts, now: float, fingerprint: str = "f") -> None:
    loads.announce(replica(name, counts, fingerprint=fingerprint), rows_of(counts), now)


def window(loads: ExpertLoads, window_s: float, now: float) -> dict[int, list[int]]:
    return {layer.layer: list(layer.rows) for layer in loads.reply(window_s, now).layers}


def test_rows_over_windows_and_since_the_replicas_began() -> None:
    loads = ExpertLoads()
    for second in range(0, 121, 3):
        tell(loads, "a", {1: [100 + second, 50], 2: [second, 2 * second]}, now=1000.5 + second)
        loads.announce(replica("a", {1: [0, 0], 2: [0, 0]}, 10**6), [], now=1001.5 + second)  # between two reports
    for window_s in (12, 30, 60):
        reply = loads.reply(window_s, now=1120.5)
        rate = {layer.layer: [rows / reply.window_s for rows in layer.rows] for layer in reply.layers}
        assert rate[1] == pytest.approx([1, 0], abs=3 / window_s)
        assert rate[2] == pytest.approx([1, 2], abs=6 / window_s)
        assert reply.window_s == pytest.approx(window_s, abs=3)
    assert window(loads, 600, now=1120.5) == {1: [120, 0], 2: [120, 240]}
    assert loads.reply(600, now=1120.5).window_s == pytest.approx(120)
    assert window(loads, 0, now=1120.5) == {1: [220, 50], 2: [120, 240]}
    assert loads.reply(0, now=1121.5).oldest_report_s == pytest.approx(1)
    assert window(loads, 600, now=3000) == {1: [0, 0], 2: [0, 0]}


def beat(loads: ExpertLoads, name: str, busy: float, rows: int | None, now: float, fingerprint: str = "f") -> None:
    """An announcement with a busy share, with counters unless `rows` is None."""
    entry = replica(name, {1: [rows or 0]}, 10**6, fingerprint)
    entry.load.busy = busy
    loads.announce(entry, [] if rows is None else rows_of({1: [rows]}), now)


def test_busy_seconds_cover_the_same_time_as_the_rows() -> None:
    """30 rows/s at a busy share of 0.25 until second 60, then 160 rows/s at 0.8: 120 and 200 rows per busy second.
    Shares come each second, counters each third one, once late."""
    loads = ExpertLoads()
    rows = 0
    for second in range(121):
        rows += 0 if second == 0 else 30 if second <= 60 else 160
        reported = second % 3 == 0 and second not in (87, 90)
        beat(loads, "a", 0.25 if second <= 60 else 0.8, rows if reported else None, now=900 + second)
    for window_s, now in [(60, 1020), (30, 1020), (12, 1020), (12, 1022.9)]:
        reply = loads.reply(window_s, now)
        assert sum(reply.layers[0].rows) / reply.busy_s == pytest.approx(200)
    assert loads.reply(600, 1020).busy_s == pytest.approx(0.25 * 60 + 0.8 * 60)
    assert loads.reply(0, 1020).busy_s == 0
    assert loads.reply(60, 3000).busy_s == 0


def test_busy_seconds_are_those_of_the_model_whose_rows_are_told() -> None:
    loads = ExpertLoads()
    for second in range(0, 31, 3):
        for name in "ab":
            beat(loads, name, 0.5, 10 * second, 900 + second)
        beat(loads, "other", 1.0, second, 900 + second, fingerprint="g")
    reply = loads.reply(60, 930)
    assert (reply.fingerprint, sum(reply.layers[0].rows)) == ("f", 600)
    assert reply.busy_s == pytest.approx(2 * 0.5 * 30)


@pytest.mark.parametrize(("share", "busy_s"), [(float("nan"), 0), (-1, 0), (7, 0), (float("inf"), 0), (1.02, 3)])
def test_what_is_no_busy_share_counts_as_none(share: float, busy_s: float) -> None:
    loads = ExpertLoads()
    beat(loads, "a", share, 0, 900)
    beat(loads, "a", share, 5, 903)
    assert loads.reply(60, 903).busy_s == busy_s


def test_replicas_are_summed_and_those_that_left_stay_in_the_window() -> None:
    loads = ExpertLoads()
    for name in "ab":
        tell(loads, name, {1: [0, 0]}, now=0)
        tell(loads, name, {1: [7, 3]}, now=3)
    assert window(loads, 30, now=4) == {1: [14, 6]}
    loads.withdraw("a")
    assert window(loads, 30, now=5) == {1: [14, 6]} and window(loads, 0, now=5) == {1: [7, 3]}
    loads.withdraw("b")
    assert window(loads, 30, now=6) == {1: [14, 6]} and window(loads, 0, now=6) == {1: [0, 0]}
    assert window(loads, 30, now=60) == {1: [0, 0]}


def test_groups_may_hold_other_experts_in_each_layer() -> None:
    loads = ExpertLoads()
    for name, layer, experts in [("a", 5, [2, 9]), ("b", 5, [0, 9]), ("c", 3, [1])]:
        entry = pb.Replica(
            replica_id=name,
            fingerprint="f",
            layers=[expert_pb2.LayerExperts(layer=layer, experts=experts)],
            load=expert_pb2.Load(rows_total=100),
        )
        loads.announce(entry, [pb.LayerRows(layer=layer, experts=experts, rows=[0] * len(experts))], now=1)
        loads.announce(entry, [pb.LayerRows(layer=layer, experts=experts, rows=[4] * len(experts))], now=2)
    found = loads.reply(30, now=2).layers
    assert [(one.layer, list(one.experts), list(one.rows)) for one in found] == [
        (3, [1], [4]),
        (5, [0, 2, 9], [4, 4, 8]),
    ]


def test_what_came_late_makes_no_peak() -> None:
    loads = ExpertLoads()
    tell(loads, "a", {1: [0]}, now=0)
    tell(loads, "a", {1: [600]}, now=60)
    assert window(loads, 12, now=60)[1] == [120]
    assert window(loads, 60, now=60)[1] == [600]
    tell(loads, "a", {1: [10_600]}, now=10_060)
    assert window(loads, 600, now=10_060)[1] == [10_000]


@pytest.mark.parametrize(
    ("entry", "told", "why"),
    [
        (replica("a", {1: [9, 10]}), rows_of({1: [9, 10]}), "a counter went backwards"),
        (replica("a", {1: [10, 11]}, 10), rows_of({1: [10, 11]}), "its experts got 11 rows or more, of 10 in all"),
        (replica("a", {1: [0, 0]}, 10**12), rows_of({1: [10**12, 10]}), "rows in 3.0 s are impossible"),
        (replica("a", {1: [0, 0]}, 2**64 - 1), rows_of({1: [2**64 - 1, 10]}), "rows are impossible"),
        (replica("a", {1: [10, 10]}), rows_of({2: [10, 10]}), "their layers are not those"),
        (replica("a", {1: [10, 10]}), rows_of({1: [10, 10], 2: [1, 1]}), "their layers are not those"),
        (replica("a", {1: [10, 10]}), rows_of({1: [10, 10, 10]}), "layer 1: their experts are not those"),
        (replica("a", {1: [10, 10]}), [pb.LayerRows(layer=1, experts=[0, 1], rows=[10])], "1 counters for 2 experts"),
        (replica("a", {1: [10, 10]}, 5), rows_of({1: [10, 10]}), "10 rows or more, of 5 in all"),
    ],
)
def test_a_replica_that_lies_is_refused_in_one_line_and_poisons_nothing(
    entry: pb.Replica, told: list[pb.LayerRows], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    loads = ExpertLoads()
    for name in "ab":
        tell(loads, name, {1: [0, 0]}, now=0)
        tell(loads, name, {1: [10, 10]}, now=3)
    with caplog.at_level(logging.WARNING):
        for now in (6, 9, 12):
            loads.announce(entry, told, now=now if now > 6 else 6)
    (record,) = caplog.records
    assert "replica a: its expert rows do not count: " in record.getMessage() and why in record.getMessage()
    assert window(loads, 30, now=12) == {1: [20, 20]}
    tell(loads, "a", {1: [12, 10]}, now=15)
    assert window(loads, 30, now=15) == {1: [22, 20]}, "it makes sense again"
    with caplog.at_level(logging.WARNING):
        loads.announce(entry, told, now=18)
    assert len(caplog.records) == 2


def test_a_lie_with_the_first_report_is_logged_once_too(caplog: pytest.LogCaptureFixture) -> None:
    loads = ExpertLoads()
    with caplog.at_level(logging.WARNING):
        for now in range(3):
            loads.announce(replica("a", {1: [5]}, 1), rows_of({1: [5]}), now)
    assert len(caplog.records) == 1
    assert loads.reply(30, 3) == pb.ExpertLoadReply()


def test_what_was_counted_before_the_directory_began_belongs_to_no_window() -> None:
    loads = ExpertLoads()
    tell(loads, "a", {1: [1_000_000]}, now=50)
    tell(loads, "a", {1: [1_000_030]}, now=53)
    assert window(loads, 600, now=53) == {1: [30]} and window(loads, 0, now=53) == {1: [1_000_030]}


def test_a_replica_whose_experts_change_counts_from_there() -> None:
    loads = ExpertLoads()
    tell(loads, "a", {1: [5, 5]}, now=0)
    tell(loads, "a", {1: [100]}, now=3)
    tell(loads, "a", {1: [101]}, now=6)
    assert window(loads, 30, now=6) == {1: [1, 0]}


def test_the_model_of_most_replicas_is_told_of_and_models_are_few() -> None:
    loads = ExpertLoads()
    for name, fingerprint in [("a", "old"), ("b", "new"), ("c", "new")]:
        tell(loads, name, {1: [0]}, 0, fingerprint)
        tell(loads, name, {1: [5]}, 3, fingerprint)
    reply = loads.reply(30, 4)
    assert reply.fingerprint == "new" and reply.layers[0].rows == [10]
    loads.withdraw("b")
    loads.withdraw("c")
    assert loads.reply(30, 5).fingerprint == "old"
    for number in range(2 * MAX_MODELS):
        tell(loads, f"x{number}", {1: [5]}, 6, f"x{number}")
        loads.withdraw(f"x{number}")
    assert loads.reply(30, 6).layers[0].rows == [5], "models without a replica go first"


def test_a_model_of_too_many_experts_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    loads = ExpertLoads()
    tell(loads, "a", {layer: [0] * 1024 for layer in range(MAX_EXPERTS // 1024 + 1)}, 0)
    assert f"more than {MAX_EXPERTS}" in caplog.text
    assert not loads.reply(30, 1).layers


def test_balancedness_is_mean_over_largest_load_of_a_replica() -> None:
    loads = ExpertLoads()
    for second in range(0, 61, 3):
        tell(loads, "a", {1: [30 * second, 30 * second], 2: [second]}, second)
        tell(loads, "b", {1: [20 * second]}, second)
    tell(loads, "young", {1: [0]}, 48)
    for second in range(51, 61, 3):
        tell(loads, "young", {1: [40 * (second - 48)]}, second)
    balance = {one.layer: one.balancedness for one in loads.reply(30, 60).balance}
    assert balance == {1: pytest.approx((60 + 20 + 40) / 3 / 60, rel=0.05), 2: 1.0}
    loads.withdraw("a")
    assert [one.layer for one in loads.reply(30, 60).balance] == [1]


@pytest.mark.parametrize("window_s", [-1, 600.5, float("nan"), float("inf")])
def test_a_window_that_is_none_is_refused(window_s: float) -> None:
    with pytest.raises(WireError, match="window_s"):
        ExpertLoads().reply(window_s, 0)


def test_what_is_kept_does_not_grow_with_time() -> None:
    """Nor with replicas that come and go."""
    loads, sizes = ExpertLoads(), []
    for turn in range(3 * SLICES):
        now = 3.0 * (1000 + turn)  # so that the slices' numbers take the same bytes
        tell(loads, "a", {layer: [turn] * 8 for layer in range(5)}, now)
        tell(loads, f"b{turn}", {9: [turn]}, now)
        loads.withdraw(f"b{turn - 5}")
        if turn % SLICES == SLICES - 1:
            sizes.append(len(pickle.dumps(loads)))
    assert max(sizes) <= min(sizes) * 1.01
    assert sizes[-1] < SLICES * (8 * 41 + 200) + 30_000
