"""Published trace formats are read as they are, and what is wrong with a trace is told by its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertmesh.errors import ConfigError
from loadtest.config import TraceArrivals
from loadtest.trace import TraceEntry, read_trace

MOONCAKE = """\
{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48]}
{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46, 47, 2366]}
"""
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,API log
"""


def trace(folder: Path, kind: str, content: str, **more: float) -> TraceArrivals:
    path = folder / "trace"
    path.write_text(content)
    return TraceArrivals.model_validate({"kind": "trace", "path": path, "format": kind} | more)


def test_mooncake(tmp_path: Path) -> None:
    found = read_trace(trace(tmp_path, "mooncake", MOONCAKE))
    assert found.entries == (
        TraceEntry(27.482, 6955, 52, (46, 47, 48)),
        TraceEntry(30.535, 6472, 26, (46, 47, 2366)),
    )
    assert found.left_out == 0


def test_burstgpt_leaves_out_what_had_failed(tmp_path: Path) -> None:
    found = read_trace(trace(tmp_path, "burstgpt", BURSTGPT))
    assert found.entries == (TraceEntry(5, 472, 18), TraceEntry(118, 417, 276))
    assert found.left_out == 1


def test_a_window_of_a_trace_at_another_speed(tmp_path: Path) -> None:
    found = read_trace(trace(tmp_path, "burstgpt", BURSTGPT, start_s=18, speed=10))
    assert found.entries == (TraceEntry(10, 417, 276),)
    assert read_trace(trace(tmp_path, "burstgpt", BURSTGPT, max_requests=1)).entries == (TraceEntry(5, 472, 18),)


MOONCAKE_LINE = MOONCAKE.splitlines()[0]


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("mooncake", MOONCAKE_LINE + "\n\n" + MOONCAKE_LINE, ":2: an empty line"),
        ("mooncake", MOONCAKE_LINE + "\n" + MOONCAKE_LINE[:50], ":2: not JSON"),
        ("mooncake", "[1, 2]", ":1: not an object"),
        ("mooncake", '{"timestamp": 1, "input_length": 5}', ":1: output_length: is missing"),
        ("mooncake", MOONCAKE_LINE.replace("6955", "null"), ":1: input_length: is missing"),
        ("mooncake", MOONCAKE_LINE.replace("6955", "-1"), ":1: input_length: -1 is no number from 0 on"),
        ("mooncake", MOONCAKE_LINE.replace("6955", "true"), ":1: input_length: True is no number"),
        ("mooncake", MOONCAKE_LINE.replace("[46", '["x"'), ":1: hash_ids: not a list of whole numbers"),
        ("mooncake", "\n".join(reversed(MOONCAKE.splitlines())), ":2: time goes back, from 30.535 s to 27.482 s"),
        ("burstgpt", BURSTGPT.replace("45,", "4,"), ":3: time goes back, from 5 s to 4 s"),
        ("burstgpt", BURSTGPT.replace("472", ""), ":2: Request tokens: is missing"),
        ("burstgpt", BURSTGPT.replace("472", "nan"), ":2: Request tokens: 'nan' is no number"),
        ("burstgpt", BURSTGPT.replace("472", "0"), ":2: Request tokens: '0' is no whole number from 1 on"),
        ("burstgpt", BURSTGPT.replace("118,GPT-4,417,276,693,API log", "118"), ":4: Request tokens: is missing"),
        ("burstgpt", BURSTGPT.replace("Request tokens", "Tokens"), ":1: no column 'Request tokens'"),
        ("burstgpt", BURSTGPT.splitlines()[0], "holds no request"),
        ("mooncake", "", "holds no request"),
    ],
)
def test_what_is_wrong_with_a_trace(tmp_path: Path, kind: str, content: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_trace(trace(tmp_path, kind, content))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    missing = TraceArrivals.model_validate({"kind": "trace", "path": tmp_path / "none", "format": "mooncake"})
    with pytest.raises(ConfigError, match="none: no such file or directory"):
        read_trace(missing)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    given = trace(tmp_path, "mooncake", "")
    given.path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        read_trace(given)
