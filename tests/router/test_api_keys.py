"""Who gets through the ingress: the middleware before a real server, keys in a real file."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from expertmesh import api_key_file
from expertmesh.args import RouterArgs
from expertmesh.cluster.smoke import check_refusal
from expertmesh.commands.generate import stream
from expertmesh.errors import ClusterError
from router_service.api_keys import SETTLED_S, ApiKeys, KeyFile
from router_service.app import http_app
from router_service.error_shape import Message

OLD_NS = 10**18
"""A time stamp of long ago, with which a file has settled."""


class Server:
    """Answers every path with the headers that reached it."""

    def __init__(self, keys: Path) -> None:
        self.keys = keys
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        routes = [Route("/{path:path}", self._echo, methods=["GET", "POST", "OPTIONS"])]
        app = Starlette(routes=routes, middleware=[Middleware(ApiKeys, path=keys)])
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, args=([self.listening],), daemon=True)

    async def _echo(self, request: Request) -> JSONResponse:
        return JSONResponse({"headers": dict(request.headers)})

    def get(self, path: str = "/v1/models", key: str | None = None) -> httpx.Response:
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {key}"} if key else {})


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.txt"


@pytest.fixture
def server(keys: Path) -> Iterator[Server]:
    api_key_file.create(keys, "other")
    running = Server(keys)
    running.thread.start()
    while not running.server.started:
        assert running.thread.is_alive()
        time.sleep(0.01)
    yield running
    running.server.should_exit = True
    running.thread.join()
    running.listening.close()


def check_refused(answer: httpx.Response) -> None:
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("AuthenticationError", None, 401)
    assert "Authorization: Bearer KEY" in error["message"]


def test_only_a_key_of_the_file_opens(server: Server) -> None:
    _, key = api_key_file.create(server.keys, "mine")
    assert server.get(key=key).status_code == 200
    check_refused(server.get())
    check_refused(server.get(key=key[:-1] + ("a" if key[-1] != "a" else "b")))
    check_refused(server.get(key=api_key_file.create(server.keys.with_name("elsewhere"), None)[1]))


def test_helm_test_sees_that_it_is_closed(server: Server) -> None:
    assert check_refusal(server.url, "demo").startswith("completion: refused without a key")


def test_the_key_goes_no_further(server: Server) -> None:
    _, key = api_key_file.create(server.keys, "mine")
    assert key not in server.get(key=key).text
    assert "authorization" not in server.get(key=key).json()["headers"]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/completions", "/tokenize", "/docs", "/unknown", "/health/", "//health"]
)
def test_closed_without_a_key(server: Server, path: str) -> None:
    check_refused(server.get(path))
    check_refused(httpx.post(server.url + path, content=b"{}"))
    check_refused(httpx.options(server.url + path, headers={"Origin": "http://a"}))


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_need_no_key(server: Server, path: str) -> None:
    assert server.get(path).status_code == 200


def test_the_openai_client_gets_in_or_an_authentication_error(server: Server) -> None:
    _, key = api_key_file.create(server.keys, "mine")
    for given, status in ((key, 200), ("sk-none", 401)):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=given, max_retries=0)
        try:
            found = client.models.with_raw_response.list().status_code
        except openai.AuthenticationError as error:
            found = error.status_code
        assert found == status


def test_generate_sends_the_key_of_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    _, key = api_key_file.create(server.keys, "mine")
    options: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "seed": None, "chat": False}
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ClusterError, match="401: No valid API key"):
        list(stream(f"{server.url}/v1", "m", "x", **options))
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert "".join(stream(f"{server.url}/v1", "m", "x", **options)) == "", "the server's answer has no events"


def raw(server: Server, *headers: bytes, path: bytes = b"/v1/models") -> bytes:
    with socket.create_connection(server.listening.getsockname()) as connection:
        request = b"\r\n".join([b"GET %s HTTP/1.1" % path, b"Host: h", *headers, b"Connection: close", b"", b""])
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def test_headers_that_nobody_should_send(server: Server) -> None:
    _, key = api_key_file.create(server.keys, "mine")
    good = b"Authorization: Bearer " + key.encode()
    assert b" 200 " in raw(server, good).splitlines()[0]
    assert b" 200 " in raw(server, good.replace(b"Bearer", b"bEARER ")).splitlines()[0]
    for headers in (
        [good, good],
        [good, b"authorization: Basic eDp5"],
        [good.replace(b"Bearer", b"Basic")],
        [good.replace(b"Bearer ", b"")],
        [b"Authorization:"],
        [b"Authorization: Bearer"],
        [b"Authorization: Bearer "],
        [good + b" x"],
        [good + b"\xff"],
        [b"Authorization: Bearer \xc3\xa4\xff" + b"a" * 44],
        [b"Authorization: \xff\xfe"],
        [b"X-Api-Key: " + key.encode()],
        [b"Authorization: Bearer " + b"a" * 2**20],
    ):
        answer = raw(server, *headers)
        assert answer.startswith(b"HTTP/1.1 401 "), (headers[-1][:60], answer[:200])
        assert key.encode() not in answer


def test_a_websocket_is_refused(server: Server) -> None:
    _, key = api_key_file.create(server.keys, "mine")
    upgrade = [b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13"]
    with socket.create_connection(server.listening.getsockname()) as connection:
        headers = [
            b"Host: h",
            *upgrade,
            b"Sec-WebSocket-Key: " + b"A" * 22 + b"==",
            b"Authorization: Bearer " + key.encode(),
        ]
        connection.sendall(b"\r\n".join([b"GET /health HTTP/1.1", *headers, b"", b""]))
        assert connection.recv(65536).startswith(b"HTTP/1.1 403 ")


def test_keys_come_and_go_without_a_restart(server: Server) -> None:
    first, second = (api_key_file.create(server.keys, name)[1] for name in ("first", "second"))
    assert (server.get(key=first).status_code, server.get(key=second).status_code) == (200, 200)
    api_key_file.revoke(server.keys, "first")
    assert (server.get(key=first).status_code, server.get(key=second).status_code) == (401, 200)
    api_key_file.revoke(server.keys, "second")
    assert server.get(key=second).status_code == 401


def settle(path: Path, file: KeyFile) -> None:
    """As if the file had lain there for long: it is not read again until it changes."""
    assert SETTLED_S < 10
    found = path.stat()
    file._seen = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def test_a_swapped_symbolic_link_is_followed(tmp_path: Path) -> None:
    """As Kubernetes updates a mounted Secret: file -> ..data/file, ..data -> a folder that is replaced."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        api_key_file.create(tmp_path / folder / "keys", folder)
        os.utime(tmp_path / folder / "keys", ns=(OLD_NS, OLD_NS))
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "keys").symlink_to("..data/keys")
    file = KeyFile(tmp_path / "keys")
    before = file.hashes()
    settle(tmp_path / "keys", file)
    assert file.hashes() == before
    (tmp_path / "..new").symlink_to("two")
    (tmp_path / "..new").rename(tmp_path / "..data")
    assert len(file.hashes()) == 1
    assert file.hashes() != before


def test_an_unchanged_file_is_not_read_again(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api_key_file.create(keys, "a")
    file = KeyFile(keys)
    before = file.hashes()
    settle(keys, file)

    def unexpected(path: Path) -> None:
        raise AssertionError(f"{path} was read")

    with monkeypatch.context() as patched:
        patched.setattr("expertmesh.api_keys.read", unexpected)
        assert file.hashes() == before
        keys.write_text(keys.read_text())
        with pytest.raises(AssertionError, match="was read"):
            file.hashes()


@pytest.mark.parametrize("damage", ["garbage", "binary", "twice", "gone", "a folder"])
def test_a_damaged_file_keeps_the_last_good_keys(keys: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    _, key = api_key_file.create(keys, "a")
    file, good = KeyFile(keys), keys.read_text()
    before = file.hashes()
    keys.unlink()
    contents = {"garbage": f"{key}\n".encode(), "binary": b"\xff\x00", "twice": (good + good).encode()}
    if damage in contents:
        keys.write_bytes(contents[damage])
    elif damage == "a folder":
        keys.mkdir()
    caplog.clear()
    assert [file.hashes() for _ in range(3)] == [before] * 3
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith(f"API keys: the 1 read before stay in force: {keys}")
    assert key not in line and "\n" not in line
    if damage == "a folder":
        keys.rmdir()
    keys.write_text(good + "# changed\n")
    api_key_file.create(keys, "b")
    assert len(file.hashes()) == 2


@pytest.mark.parametrize("content", [None, "", "# no key yet\n", "nonsense"])
def test_without_keys_nobody_gets_in(keys: Path, content: str | None, caplog: pytest.LogCaptureFixture) -> None:
    if content is not None:
        keys.write_text(content)
    caplog.set_level(logging.WARNING)
    file = KeyFile(keys)
    assert [file.hashes() for _ in range(3)] == [()] * 3
    (record,) = caplog.records
    assert "none, nobody gets in" in record.getMessage()
    assert str(keys) in record.getMessage()


def call(app: ApiKeys, scope: dict[str, Any]) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    asyncio.run(app(scope, receive, send))
    return sent


def test_no_line_of_the_log_holds_a_key(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    _, key = api_key_file.create(keys, "a")

    async def inner(scope: Message, receive: Any, send: Any) -> None:
        logging.getLogger("app").info("%s", scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    app = ApiKeys(inner, keys)
    for value in (key, key + "x"):
        headers = [(b"Authorization", b"Bearer " + value.encode())]
        sent = call(app, {"type": "http", "path": "/v1/models", "headers": headers})
        assert key not in json.dumps(sent, default=str)
    assert "GET" not in caplog.text and "/v1/models" in caplog.text, "the app was reached and logged its scope"
    assert key not in caplog.text


def test_the_ingress_asks_for_keys_where_a_file_is_named(keys: Path) -> None:
    """Ray Serve LLM's own application and all its middleware, which has no routes yet."""
    _, key = api_key_file.create(keys, "a")

    async def answers(api_keys: str | None, sent: str | None) -> tuple[int, str]:
        args = RouterArgs(artifact="/absent", name="demo", api_keys=api_keys)
        transport = httpx.ASGITransport(http_app(args))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
            got = await client.get("/v1/models", headers={"Authorization": f"Bearer {sent}"} if sent else {})
            return got.status_code, got.json()["error"]["type"]

    assert asyncio.run(answers(None, None)) == (404, "NotFoundError")
    assert asyncio.run(answers(str(keys), None)) == (401, "AuthenticationError")
    assert asyncio.run(answers(str(keys), key)) == (404, "NotFoundError")
