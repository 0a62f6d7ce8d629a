"""Server-sent events, and what those of the OpenAI API say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from expertmesh.errors import WireError

MAX_EVENT_BYTES = 2**24


class EventStream:
    """Bytes in, the data of events out; comments and other fields are passed over."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> Iterator[bytes]:
        """The data of each event that `received` completes; raises WireError for an event without end."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise WireError(f"an event of more than {MAX_EVENT_BYTES >> 20} MiB")
        for line in (line.rstrip(b"\r") for line in lines):
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data.clear()


class Answer:
    """What an event stream has told so far."""

    def __init__(self, chat: bool) -> None:
        self._chat = chat
        self.finished = False
        """Whether the server said that this is all."""
        self.error: str | None = None
        """An error event's message."""
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def add(self, data: bytes) -> bool:
        """Whether the event bears choices, which is what counts as a token; raises WireError for what is no event."""
        if data == b"[DONE]":
            self.finished = True
            return False
        try:
            event = json.loads(data)
        except ValueError:
            raise WireError(f"an event that is not JSON: {data[:60].decode(errors='replace')!r}") from None
        if not isinstance(event, dict):
            raise WireError(f"an event that is no object: {data[:60].decode(errors='replace')!r}")
        if "error" in event:
            self.error = error_message(event)
            return False
        self._count(event.get("usage"))
        choices = event.get("choices")
        if not choices:
            return False
        if not isinstance(choices, list) or not isinstance(choices[0], dict):
            raise WireError("an event whose choices are no list of objects")
        self._take(choices[0])
        return True

    def _take(self, choice: dict[str, Any]) -> None:
        piece = choice.get("text")
        if self._chat:
            delta = choice.get("delta")
            piece = delta.get("content") if isinstance(delta, dict) else None
        if isinstance(piece, str) and piece:
            self._pieces.append(piece)
        self.finished |= choice.get("finish_reason") is not None

    def _count(self, usage: object) -> None:
        if isinstance(usage, dict):
            self.prompt_tokens = _whole(usage.get("prompt_tokens"), self.prompt_tokens)
            self.output_tokens = _whole(usage.get("completion_tokens"), self.output_tokens)


def error_message(body: object) -> str:
    """Of an OpenAI error in any of its shapes, one line."""
    found = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(found, dict):
        found = found.get("message", found)
    return " ".join(str(found).split())[:300]


def _whole(value: object, otherwise: int | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise
