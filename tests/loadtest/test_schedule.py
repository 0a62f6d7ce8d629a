"""A schedule is a pure function of config, seed and repeat, whatever the number of client processes."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from stub import config_for, poisson

from expertmesh.errors import ConfigError
from loadtest import lengths
from loadtest.config import FileLength, LognormalLength, RunConfig, UniformLength
from loadtest.schedule import OpenStage, Schedule, Session

DOMAINS = ("code", "prose")
RICH = {
    "prompt_tokens": {"kind": "lognormal", "median": 64, "sigma": 0.5, "low": 8, "high": 256},
    "output_tokens": {"kind": "uniform", "low": 4, "high": 9},
    "shared_prefix": {"tokens": 32, "count": 3, "share": 0.5},
    "turns": {"number": {"kind": "uniform", "low": 1, "high": 3}, "think_s": 0.5},
    "cancel": {"share": 0.2},
    "domains": [{"weights": {"code": 1}}, {"at_s": 50, "weights": {"code": 1, "prose": 3}}],
}


def config(**sections: Any) -> RunConfig:
    return config_for("http://h/v1", poisson(20, 100), **{"workload": RICH, **sections})


def sessions(given: RunConfig, repeat: int = 0, shard: int = 0, shards: int = 1) -> list[Session]:
    schedule = Schedule(given, repeat, DOMAINS)
    open_stages = [stage for stage in schedule.stages if isinstance(stage, OpenStage)]
    return [session for stage in open_stages for session in schedule.sessions(stage, shard, shards)]


def test_the_same_seed_gives_the_same_sessions() -> None:
    assert sessions(config(seed=5)) == sessions(config(seed=5))


def test_seed_and_repeat_draw_anew() -> None:
    first = {session.scheduled_s for session in sessions(config(seed=5))}
    assert first.isdisjoint(session.scheduled_s for session in sessions(config(seed=6)))
    assert first.isdisjoint(session.scheduled_s for session in sessions(config(seed=5), repeat=1))


def test_processes_share_out_the_very_same_sessions() -> None:
    shared = [session for shard in range(3) for session in sessions(config(), shard=shard, shards=3)]
    assert sorted(shared, key=lambda session: session.index) == sessions(config())


def test_one_setting_leaves_the_draws_of_the_others_alone() -> None:
    plain = sessions(config(workload=RICH | {"cancel": None, "shared_prefix": None}))
    for mine, others in zip(sessions(config()), plain, strict=True):
        assert (mine.scheduled_s, mine.seed) == (others.scheduled_s, others.seed)
        assert [turn.prompt_tokens for turn in mine.turns][:1] == [turn.prompt_tokens for turn in others.turns][:1]


def test_shares_are_as_asked() -> None:
    found = sessions(config())
    turns = [turn for session in found for turn in session.turns]
    assert len(found) == pytest.approx(2000, rel=0.1)
    assert sum(turn.cancel_after == 8 for turn in turns) / len(turns) == pytest.approx(0.2, abs=0.03)
    prefixes = Counter(session.prefix for session in found)
    assert prefixes[None] / len(found) == pytest.approx(0.5, abs=0.05)
    assert set(prefixes) == {None, 0, 1, 2}
    assert {session.prefix_tokens for session in found if session.prefix is not None} == {32}
    assert Counter(len(session.turns) for session in found).keys() == {1, 2, 3}
    assert {turn.output_tokens for turn in turns} == set(range(4, 10))


def test_the_mix_of_domains_changes_at_its_time() -> None:
    found = sessions(config())
    early = {session.domain for session in found if session.scheduled_s < 50}
    late = [session.domain for session in found if session.scheduled_s >= 50]
    assert early == {"code"}
    assert late.count("prose") / len(late) == pytest.approx(0.75, abs=0.05)


def test_stages_follow_one_another_and_indices_are_their_own() -> None:
    stages = [poisson(5, 10), poisson(9, 10) | {"name": "second", "measured": False}]
    given = config_for("http://h/v1", *stages)
    found = sessions(given)
    assert [session.index for session in found] == list(range(len(found)))
    assert all(a.scheduled_s <= b.scheduled_s for a, b in pairwise(found))
    assert {session.stage for session in found if session.scheduled_s >= 10} == {"second"}
    assert [(span.start_s, span.end_s, span.measured) for span in Schedule(given, 0, DOMAINS).spans] == [
        (0, 10, True),
        (10, 20, False),
    ]


def test_a_trace_gives_times_lengths_and_blocks(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text(
        '{"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [1, 2]}\n'
        '{"timestamp": 4000, "input_length": 9, "output_length": 6, "hash_ids": [3]}\n'
    )
    trace = {"kind": "trace", "path": tmp_path / "trace.jsonl", "format": "mooncake", "speed": 2}
    given = config_for("http://h/v1", poisson(5, 10), {"name": "replay", "arrivals": trace})
    found = [session for session in sessions(given) if session.stage == "replay"]
    assert [(one.scheduled_s, one.turns[0].prompt_tokens, one.turns[0].output_tokens, one.blocks) for one in found] == [
        (10, 700, 5, (1, 2)),
        (12, 9, 6, (3,)),
    ]
    assert Schedule(given, 0, DOMAINS).duration_s == 12


def test_a_run_without_a_single_arrival_is_refused() -> None:
    with pytest.raises(ConfigError, match="not one arrival"):
        Schedule(config_for("http://h/v1", poisson(0.001, 0.1)), 0, DOMAINS)


def test_lengths_follow_their_distribution(tmp_path: Path) -> None:
    generator = random.Random(0)

    def draws(length: Any) -> list[int]:
        return sorted(lengths.draw(length, generator) for _ in range(2001))

    lognormal = draws(LognormalLength(kind="lognormal", median=100, sigma=0.5, low=20, high=300))
    assert lognormal[1000] == pytest.approx(100, rel=0.05)
    assert lognormal[int(2001 * 0.8413)] == pytest.approx(100 * 2.718281828**0.5, rel=0.07)
    assert (lognormal[0], lognormal[-1]) == (20, 300)
    uniform = draws(UniformLength(kind="uniform", low=3, high=5))
    assert Counter(uniform)[4] == pytest.approx(667, abs=80) and {3, 4, 5} == set(uniform)
    (tmp_path / "lengths").write_text("7\n7\n7\n40\n")
    assert Counter(draws(FileLength(kind="file", path=tmp_path / "lengths")))[40] == pytest.approx(500, abs=80)
