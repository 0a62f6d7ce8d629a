"""Server-sent events are read the same however the bytes arrive, and what is no answer is named."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.errors import WireError
from loadtest.event_stream import MAX_EVENT_BYTES, Answer, EventStream, error_message

STREAM = (
    b': ping\n\ndata: {"a": 1}\n\nevent: x\r\ndata: {"b":\r\ndata: 2}\r\n\r\nid: 7\n\ndata:{"c": 3}\n\ndata: [DONE]\n\n'
)
EVENTS = [b'{"a": 1}', b'{"b":\n2}', b'{"c": 3}', b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_events_are_the_same_wherever_the_bytes_are_cut(cuts: list[int]) -> None:
    stream, places = EventStream(), [0, *sorted(cuts), len(STREAM)]
    found = [data for a, b in pairwise(places) for data in stream.feed(STREAM[a:b])]
    assert found == EVENTS


def test_an_event_without_an_end_is_refused() -> None:
    with pytest.raises(WireError, match="more than 16 MiB"):
        list(EventStream().feed(b"x" * (MAX_EVENT_BYTES + 1)))


def event(**content: object) -> bytes:
    return json.dumps(content).encode()


def test_a_completion() -> None:
    answer = Answer(chat=False)
    assert answer.add(event(choices=[{"text": "a", "finish_reason": None}]))
    assert answer.add(event(choices=[{"text": ""}]))
    assert not answer.finished
    assert answer.add(event(choices=[{"text": "b", "finish_reason": "length"}]))
    assert answer.finished
    assert not answer.add(event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 3}))
    assert not answer.add(b"[DONE]")
    assert (answer.text, answer.prompt_tokens, answer.output_tokens, answer.error) == ("ab", 5, 3, None)


def test_a_chat() -> None:
    answer = Answer(chat=True)
    assert answer.add(event(choices=[{"delta": {"role": "assistant", "content": ""}}]))
    assert answer.add(event(choices=[{"delta": {"content": "a"}}], usage={"prompt_tokens": 2}))
    assert answer.add(event(choices=[{"delta": {}, "finish_reason": "stop"}]))
    assert (answer.text, answer.prompt_tokens, answer.output_tokens, answer.finished) == ("a", 2, None, True)


@pytest.mark.parametrize("shape", [{"error": {"message": "out of\nmemory"}}, {"error": "out of memory"}])
def test_an_error_in_the_stream(shape: dict[str, object]) -> None:
    answer = Answer(chat=False)
    assert not answer.add(event(**shape))
    assert answer.error == "out of memory"


@pytest.mark.parametrize("data", [b"hello", b"[1]", b'{"choices": "x"}', b'{"choices": [3]}', b'"x"'])
def test_what_is_no_event(data: bytes) -> None:
    with pytest.raises(WireError, match="an event"):
        Answer(chat=False).add(data)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "m", "code": 4}}, "m"),
        ({"object": "error", "message": "m"}, "m"),
        ({"detail": "Not Found"}, "{'detail': 'Not Found'}"),
        ("<html>\n x</html>", "<html> x</html>"),
    ],
)
def test_errors_in_all_shapes(body: object, said: str) -> None:
    assert error_message(body) == said
