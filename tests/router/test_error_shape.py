from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from router_service.error_shape import ErrorShape, openai_error

TOO_LONG = (
    "Message: This model's maximum context length is 512 tokens. (Request ID: 1f-2), Internal exception: "
    "ray.llm.OpenAIHTTPException (Request ID: 1f-2), original exception: "
)


UNKNOWN = 'Could not find base model with ID "nope".'
LIMIT = "This model's maximum context length is 512 tokens."
TWO_LINES = {"message": "JSON decode\nerror", "type": "json_invalid", "param": {}}


@pytest.mark.parametrize(
    ("status", "body", "message", "kind"),
    [
        (404, {"detail": UNKNOWN}, UNKNOWN, "NotFoundError"),
        (400, {"error": {"message": TOO_LONG, "type": "OpenAIHTTPException"}}, LIMIT, "BadRequestError"),
        (400, {"error": TWO_LINES}, "JSON decode error", "json_invalid"),
        (500, {"error": {}}, "Internal Server Error", "ServerError"),
        (503, {}, "Service Unavailable", "ServerError"),
        (400, ["odd"], "['odd']", "BadRequestError"),
    ],
)
def test_one_line_in_openai_s_shape(status: int, body: object, message: str, kind: str) -> None:
    expected = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    assert openai_error(status, json.dumps(body).encode()) == expected


def test_text_that_is_no_json() -> None:
    assert openai_error(502, b"bad\ngateway")["error"]["message"] == "bad gateway"
    assert openai_error(502, b"")["error"]["message"] == "Bad Gateway"


@pytest.mark.parametrize(("status", "retry_after"), [(503, [b"2"]), (500, []), (400, [])])
def test_who_may_try_again_is_told_when(status: int, retry_after: list[bytes]) -> None:
    sent: list[Any] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def keep(message: Any) -> None:
        sent.append(message)

    asyncio.run(ErrorShape(answer)({"type": "http"}, None, keep))  # type: ignore[arg-type]
    assert [value for name, value in sent[0]["headers"] if name == b"retry-after"] == retry_after
