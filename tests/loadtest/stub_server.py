"""An OpenAI API whose latencies are known: it answers on a schedule and tells which (`GET /log`).

The server is as if frozen during a stall: what was to happen then, and all after it, happens that much later.
`python stub_server.py --ttft 0.2 --itl 0.02` prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

MODEL = "stub"


@dataclass
class Settings:
    ttft_s: tuple[float, float] = (0.2, 0.2)
    """Bounds of a uniform draw per request; likewise itl_s."""
    itl_s: tuple[float, float] = (0.02, 0.02)
    slots: int | None = None
    """Requests served at once; others wait. None: all."""
    seed: int = 0


@dataclass
class Answered:
    """What was injected into one answer; times of time.monotonic()."""

    request_id: str
    arrived_s: float
    due_s: list[float]
    """When each token is due to leave, in the server's own time."""


@dataclass
class Stub:
    settings: Settings
    log: list[Answered] = field(default_factory=list)
    stall: tuple[float, float] | None = None
    """Begin and end, time.monotonic()."""
    open_streams: int = 0
    most_streams: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.settings.seed)
        self.busy = 0
        self.queue: deque[Connection] = deque()

    def schedule(self, begin_s: float, tokens: int) -> list[float]:
        """When each token leaves, of an answer that is begun at `begin_s`; in the server's own time."""
        ttft, itl = self.random.uniform(*self.settings.ttft_s), self.random.uniform(*self.settings.itl_s)
        begin = self.thawed(begin_s)
        return [begin + ttft + index * itl for index in range(tokens)]

    def admit(self, connection: Connection, arrived_s: float) -> None:
        """Begins the answer, or lets it wait for a slot."""
        if self.settings.slots is not None and self.busy >= self.settings.slots:
            self.queue.append(connection)
        else:
            self.busy += 1
            connection.begin(arrived_s)

    def release(self, at_s: float) -> None:
        """A slot is free since `at_s`, which a late timer does not change."""
        if self.queue:
            self.queue.popleft().begin(at_s)
        else:
            self.busy -= 1

    def thawed(self, real_s: float) -> float:
        """The server's own time, which stands still during a stall."""
        if self.stall is None or real_s < self.stall[0]:
            return real_s
        return max(self.stall[0], real_s - (self.stall[1] - self.stall[0]))

    def real(self, thawed_s: float) -> float:
        if self.stall is None or thawed_s < self.stall[0]:
            return thawed_s
        return thawed_s + self.stall[1] - self.stall[0]


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, requests one after another."""

    def __init__(self, stub: Stub) -> None:
        self.stub = stub
        self.buffer = b""
        self.loop = asyncio.get_running_loop()
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self.stub.queue:
            self.stub.queue.remove(self)
            self.stub.open_streams -= 1
        elif self.timer is not None:
            self.timer.cancel()
            self.timer = None
            self.stub.open_streams -= 1
            self.stub.release(self.loop.time())

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            first, *lines = self.buffer[:end].decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            length = int(headers.get("content-length", 0))
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
            path = first.split(" ")[1]
            self.handle(path, headers, body)

    def handle(self, path: str, headers: dict[str, str], body: bytes) -> None:
        if path in {"/v1/completions", "/v1/chat/completions"}:
            self.complete(json.loads(body), headers.get("x-request-id", ""), chat="chat" in path)
        elif path == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        elif path.startswith("/stall/"):  # /stall/AFTER/FOR
            after, length = map(float, path.split("/")[2:])
            begin = time.monotonic() + after
            self.stub.stall = (begin, begin + length)
            self.reply(200, {"begin": begin})
        elif path == "/log":
            log = [
                {"id": one.request_id, "arrived": one.arrived_s, "due": [*map(self.stub.real, one.due_s)]}
                for one in self.stub.log
            ]
            self.reply(200, {"answers": log, "most_streams": self.stub.most_streams, "stall": self.stub.stall})
        elif path == "/metrics":
            self.reply(200, f'vllm:num_requests_running{{engine="0"}} {self.stub.open_streams}\n', "text/plain")
        else:
            self.reply(404, {"error": {"message": f"no {path}"}})

    def reply(self, status: int, content: object, kind: str = "application/json") -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)

    def complete(self, body: dict[str, object], request_id: str, chat: bool) -> None:
        """Streams `max_tokens` tokens; the key `stub` asks for a misbehaviour."""
        fault = body.get("stub")
        if body.get("model") != MODEL:
            return self.reply(404, {"error": {"message": f"no model {body.get('model')}"}})
        if fault == "busy":
            return self.reply(429, {"error": {"message": "too many requests"}})
        if fault == "broken":
            return self.reply(500, {"error": {"message": "engine is dead"}})
        if fault == "html":
            return self.reply(200, "<html>welcome</html>", "text/html")
        self.request_id, self.fault = request_id, str(fault)
        self.arrived_s, self.tokens = (
            time.monotonic(),
            int(str(body.get("max_tokens") or body["max_completion_tokens"])),
        )
        self.stub.open_streams += 1
        self.stub.most_streams = max(self.stub.most_streams, self.stub.open_streams)
        asked = json.dumps(body.get("messages") or body.get("prompt"))
        usage = {"prompt_tokens": len(asked) // 4, "completion_tokens": self.tokens}
        self.last = chunk({"choices": [], "usage": usage})
        choice = {"index": 0} | ({"delta": {"content": " word"}} if chat else {"text": " word"})
        self.event = chunk({"id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": [choice]})
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        return self.stub.admit(self, self.arrived_s)

    def begin(self, at_s: float) -> None:
        due = self.stub.schedule(at_s, self.tokens)
        self.stub.log.append(Answered(self.request_id, self.arrived_s, due))
        self.emit(due, 0)

    def emit(self, due: list[float], index: int) -> None:
        """Writes what is due and sets the timer for the next token."""
        now = self.loop.time()
        while index < len(due) and self.stub.real(due[index]) <= now:
            if self.fault == "hangup" and index == len(due) // 2:
                return self.transport.abort()
            if self.fault == "error_event" and index == len(due) // 2:
                self.transport.write(chunk({"error": {"message": "engine is dead", "code": 500}}))
            self.transport.write(self.event)
            index += 1
        if index < len(due):
            self.timer = self.loop.call_at(self.stub.real(due[index]), self.emit, due, index)
            return None
        self.timer = None
        self.stub.open_streams -= 1
        done = b"data: [DONE]\n\n"
        self.transport.write(self.last + b"%x\r\n%s\r\n0\r\n\r\n" % (len(done), done))
        return self.stub.release(self.stub.real(due[-1]))


def chunk(event: Mapping[str, object]) -> bytes:
    """One server-sent event as one HTTP chunk."""
    data = b"data: " + json.dumps(event).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


async def serve(settings: Settings, port: int, ready: Callable[[int], None]) -> None:
    loop = asyncio.get_running_loop()
    # the due times are time.monotonic()'s, and so must be the timers'
    assert abs(loop.time() - time.monotonic()) < 0.1
    stub = Stub(settings)
    server = await loop.create_server(lambda: Connection(stub), "127.0.0.1", port, backlog=4096)
    ready(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttft", type=float, nargs="+", default=[0.2], help="seconds, or low and high")
    parser.add_argument("--itl", type=float, nargs="+", default=[0.02])
    parser.add_argument("--slots", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    settings = Settings((given.ttft[0], given.ttft[-1]), (given.itl[0], given.itl[-1]), given.slots, given.seed)
    try:
        asyncio.run(serve(settings, given.port, lambda port: print(port, flush=True)))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
