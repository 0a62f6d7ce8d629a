"""Who is to blame for an error of the ingress: on Ray Serve LLM's own HTTP application with our middleware."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from ray.exceptions import RayTaskError
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException, TokenizeCompletionRequest
from vllm.exceptions import RetryableRequestError, VLLMValidationError

from expertmesh.args import RouterArgs
from expertmesh.errors import ExpertMeshError
from router_service.app import http_app

JSON = "application/json"


class Away(RetryableRequestError, ValueError):  # type: ignore[misc]
    pass


ERRORS: dict[str, Exception] = {
    "value": ValueError("no such adapter"),
    "overflow": OverflowError("int too large"),
    "validation": VLLMValidationError("too hot", parameter="temperature"),
    "remote": RayTaskError("call", "Traceback: secret", TypeError("no text")).as_instanceof_cause(),
    "away": Away("experts are away"),
    "ours": ExpertMeshError("broken"),
    "refused": OpenAIHTTPException(403, "not for you"),
}


def ask(path: str, body: bytes = b"{}", kind: str = JSON) -> httpx.Response:
    app = http_app(RouterArgs(artifact="none", name="demo"))

    @app.post("/tokenize")
    async def tokenize(body: TokenizeCompletionRequest) -> None:
        return None

    @app.post("/fail/{how}")
    async def fail(how: str) -> None:
        raise ERRORS[how]

    async def post() -> httpx.Response:
        transport: Any = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, content=body, headers={"content-type": kind})

    return asyncio.run(post())


@pytest.mark.parametrize(
    ("body", "kind", "where"),
    [
        (b'{"prompt": "x"}', "text/plain", "body"),
        (b'{"prompt": "\xff"}', "application/octet-stream", "body"),
        (b'{"prompt": NaN}', JSON, "body.prompt"),
        (b'{"prompt": ["\\ud800"]}', JSON, "body.prompt"),
        (b'{"prompt": "x", "add_special_tokens": 1e999}', JSON, "body.add_special_tokens"),
    ],
)
def test_a_body_that_no_json_can_repeat_is_refused_with_where_it_is(body: bytes, kind: str, where: str) -> None:
    answer = ask("/tokenize", body, kind)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert error["param"] == where and error["message"].startswith(f"{where}: ")


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("value", 400, "no such adapter"),
        ("overflow", 400, "int too large"),
        ("validation", 400, "too hot (parameter=temperature)"),
        ("remote", 400, "no text"),
        ("away", 503, "experts are away"),
        ("ours", 500, "Internal Server Error"),
        ("refused", 403, "not for you"),
    ],
)
def test_an_error_is_the_request_s_where_vllm_says_so(how: str, status: int, message: str) -> None:
    answer = ask(f"/fail/{how}")
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == message
    assert "secret" not in answer.text


@pytest.mark.parametrize(("how", "told"), [("value", True), ("remote", True), ("validation", False)])
def test_what_may_be_a_mistake_of_ours_is_in_the_log(how: str, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    ask(f"/fail/{how}")
    found = [record for record in caplog.records if record.name == "router_service.request_errors"]
    assert bool(found) is told
    assert all(record.exc_info and "/fail/" in record.getMessage() for record in found)
