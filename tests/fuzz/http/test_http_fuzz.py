"""What of `make fuzz-http` needs no cluster."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import jsonschema
import pytest

from fuzz.http.exchange import Answer, Exchange, Request, answer_of, recorded, send
from fuzz.http.findings import Comparison, findings, summary
from fuzz.http.narrow import narrowed

ROUTES = ["/v1/models", "/v1/models/{model}", "/tokenize"]
BAD = Answer(500, "Internal Server Error")


def post(target: str, body: bytes = b"{}") -> Request:
    return Request("POST", target, (("Content-Type", "text/plain"),), body)


def test_a_record_is_read_byte_for_byte() -> None:
    body = b"\xff\x00{"
    request = {
        "method": "POST",
        "url": "http://127.0.0.1:1/v1/models/a%2F?b=c",
        "headers": [{"name": "A", "value": "b"}],
        "postData": {"text": base64.b64encode(body).decode()},
    }
    error = base64.b64encode(b'{"error": {"message": "no"}}').decode()
    answered = {"status": 500, "headers": [], "content": {"text": error}}
    silent = {"status": 0, "headers": [], "content": {}}
    har = {"log": {"entries": [{"request": request, "response": one} for one in (answered, silent)]}}
    expected = Request("POST", "/v1/models/a%2F?b=c", (("A", "b"),), body)
    assert recorded(har) == [Exchange(expected, Answer(500, "no")), Exchange(expected, Answer(0))]
    assert all(one.failed for one in recorded(har))


@pytest.mark.parametrize(
    ("status", "kind", "body", "expected"),
    [
        (200, "application/json", b'{"error": {"code": 500}}', Answer(200)),
        (200, "text/event-stream; charset=utf-8", b'data: {"id": 1}\n\ndata: [DONE]\n\n', Answer(200)),
        (200, "text/event-stream", b'data: {"error": {"code": 503, "message": "away"}}\n\n', Answer(503, "away")),
        (200, "text/event-stream", b'data: {"error": {"code": "odd"}}\n\n', Answer(500)),
        (502, "text/html", b"<html>", Answer(502)),
    ],
)
def test_an_error_in_a_stream_counts_as_its_code(status: int, kind: str, body: bytes, expected: Answer) -> None:
    assert answer_of(status, kind, body) == expected


@pytest.mark.parametrize(
    ("ours", "plain", "finds"),
    [(500, 400, True), (0, 200, True), (500, 200, True), (500, 500, False), (0, 0, False), (503, 0, False)],
)
def test_a_finding_is_what_plain_vllm_does_better(ours: int, plain: int, finds: bool) -> None:
    assert Comparison(post("/tokenize"), Answer(ours), Answer(plain)).is_finding == finds


def test_what_fails_alike_is_one_line_with_its_shortest_request() -> None:
    refused = Answer(400, "bad\n  body")
    compared = [Comparison(post("/tokenize", b"x" * size), BAD, refused) for size in (1000, 2, 30)]
    compared.append(Comparison(post("/v1/models/a/b"), Answer(0), refused))
    compared.append(Comparison(post("/tokenize"), BAD, BAD))
    assert [finding.line() for finding in findings(compared, ROUTES)] == [
        "POST /tokenize: 500 Internal Server Error; plain vLLM: 400 bad body; sent to /tokenize: text/plain, 'xx' "
        "(3 such requests)",
        "POST /v1/models/{model}: no answer within 20 s; plain vLLM: 400 bad body; sent to /v1/models/a/b: "
        "text/plain, '{}'",
    ]


def test_requests_are_counted_by_path_and_status() -> None:
    sent = [("/v1/models", 200), ("/v1/models/x", 404), ("/v1/models/y?z=1", 404), ("/tokenize", 0), ("/else", 405)]
    exchanges = [Exchange(post(target), Answer(status)) for target, status in sent]
    assert summary(exchanges, ROUTES) == {
        "/else": {"405": 1},
        "/tokenize": {"none": 1},
        "/v1/models": {"200": 1},
        "/v1/models/{model}": {"404": 2},
    }


def test_narrower_requests_name_the_model_and_have_a_prompt() -> None:
    properties = {"model": {"type": "string"}, "prompt": {}, "temperature": {}}
    served = {"components": {"schemas": {"CompletionRequest": {"type": "object", "properties": properties}}}}
    before = json.dumps(served)
    made = narrowed(served, "demo")["components"]["schemas"]["CompletionRequest"]
    assert json.dumps(served) == before
    narrow, structured, wide = (jsonschema.Draft202012Validator(one) for one in made["anyOf"])
    assert narrow.is_valid({"prompt": "a", "temperature": 1}) and narrow.is_valid({"prompt": [1, 2]})
    assert not narrow.is_valid({"prompt": "a", "temperature": 3}) and not narrow.is_valid({"prompt": "a", "odd": 3})
    assert structured.is_valid({"prompt": "a", "structured_outputs": {"choice": ["yes"]}})
    assert not structured.is_valid({"prompt": "a"})
    assert wide.is_valid({"prompt": "a", "odd": 3, "model": "demo"})
    assert not wide.is_valid({"model": "demo"}) and not wide.is_valid({"prompt": "a", "model": "other"})


class Echo(http.server.BaseHTTPRequestHandler):
    heard: ClassVar[list[Any]] = []

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.heard.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(418)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_request_is_sent_again_as_it_was(echo: str) -> None:
    body = b"\xff{"
    headers = (("Content-Type", "a/b"), ("Host", "else"), ("Content-Length", "99"), ("X-Schemathesis-TestCaseId", "q"))
    assert send(echo, Request("PUT", "/a%00b?c=%2F", headers, body)) == Answer(418)
    path, heard, got = Echo.heard.pop()
    assert (path, got, heard["content-type"], heard["content-length"]) == ("/a%00b?c=%2F", body, "a/b", "2")
    assert "x-schemathesis-testcaseid" not in heard
    assert send("http://127.0.0.1:1", post("/")) == Answer(0)
