"""An OpenAI-compatible endpoint, streamed."""

from __future__ import annotations

import json
import os
import ssl
from typing import Any

import aiohttp

from expertmesh.api_keys import client_key
from expertmesh.errors import ClusterError, ConfigError, WireError
from loadtest.config import OpenAITarget, RunConfig
from loadtest.endpoint import Endpoint
from loadtest.event_stream import Answer, EventStream, error_message
from loadtest.records import Status
from loadtest.target import Clock, Outcome, Request
from loadtest.texts import Texts

CONNECT_TIMEOUT_S = 30.0
CHECK_TIMEOUT_S = 30.0
READ_BUFFER_BYTES = 2**18


class OpenAIEndpoint:
    """Target of one client process; as many connections as there are open requests."""

    def __init__(self, config: RunConfig, endpoint: Endpoint, texts: Texts, repeat: int) -> None:
        assert isinstance(config.target, OpenAITarget) and endpoint.http is not None
        self.settings = config.target
        self._workload, self._texts, self._repeat = config.text, texts, repeat
        self._base, self.model = endpoint.http, endpoint.model
        path = "chat/completions" if self.chat else "completions"
        self.url = f"{self._base}/{path}"
        self.headers = {"content-type": "application/json"} | headers_of(self.settings)

    @property
    def chat(self) -> bool:
        return self.settings.api == "chat"

    async def open(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self.settings.timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        self.http = aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=READ_BUFFER_BYTES)

    async def check(self) -> None:
        """Asks for the models, and settles which one to use. Raises ClusterError with one line where that fails."""
        url = f"{self._base}/models"
        try:
            timeout = aiohttp.ClientTimeout(total=CHECK_TIMEOUT_S)
            async with self.http.get(url, headers=headers_of(self.settings), timeout=timeout) as answer:
                text = await answer.text()
        except TimeoutError:
            raise ClusterError(f"{url}: no answer within {CHECK_TIMEOUT_S:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ClusterError(f"{url}: {describe(error)}") from None
        try:
            body = json.loads(text)
            names = [str(model["id"]) for model in body["data"]]
        except (ValueError, TypeError, KeyError):
            if answer.status >= 400:
                message = error_message(_json_or_text(text))[:100]
                raise ClusterError(f"{url}: HTTP {answer.status}: {message}") from None
            raise ClusterError(f"{url}: does not list models as an OpenAI API does") from None
        if not names:
            raise ClusterError(f"{url}: lists no model")
        self.model = self.model or names[0]
        if self.model not in names:
            raise ClusterError(f"{url}: has no model {self.model!r} (it has: {', '.join(names[:5])})")

    def prepare(self, request: Request) -> Completion:
        asked = self._texts.prompt(request)
        body: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": self._workload.temperature,
        }
        if self._workload.ignore_eos:
            body["ignore_eos"] = True
        if self.chat:
            said = [part for turn in request.history for part in zip(("user", "assistant"), turn, strict=True)]
            body["messages"] = [{"role": role, "content": text} for role, text in (*said, ("user", asked))]
            body["max_completion_tokens"] = request.output_tokens
        else:
            body["prompt"] = "".join(part for turn in request.history for part in turn) + asked
            body["max_tokens"] = request.output_tokens
        name = f"loadtest-{self._repeat}-{request.index}-{request.turn}"
        return Completion(self, request, json.dumps(body | self._workload.body).encode(), asked, name)

    async def close(self) -> None:
        await self.http.close()


class Completion:
    """One request and its answer: an Exchange."""

    def __init__(self, endpoint: OpenAIEndpoint, request: Request, body: bytes, asked: str, name: str) -> None:
        self._endpoint, self._request, self._body, self._asked, self._name = endpoint, request, body, asked, name
        self._answer = Answer(endpoint.chat)
        self._times: list[float] = []
        self._sent_s = 0.0

    async def run(self, clock: Clock) -> Outcome:
        self._sent_s = clock.now()
        try:
            status, error = await self._follow(clock)
        except TimeoutError:
            status, error = "timeout", f"no end within {self._endpoint.settings.timeout_s:g} s"
        except aiohttp.ClientConnectorError as found:
            status, error = "refused", describe(found)
        except (aiohttp.ClientError, OSError) as found:
            status, error = "disconnected", describe(found)
        except WireError as found:
            status, error = "bad_answer", str(found)
        return self._outcome(clock, status, error)

    def partial(self, clock: Clock) -> Outcome:
        return self._outcome(clock, "unfinished", "")

    def _outcome(self, clock: Clock, status: Status, error: str) -> Outcome:
        answer, request = self._answer, self._request
        prompt = request.prompt_tokens + request.prefix_tokens if answer.prompt_tokens is None else answer.prompt_tokens
        output = len(self._times) if answer.output_tokens is None else answer.output_tokens
        times = tuple(self._times)
        return Outcome(
            self._sent_s, times, clock.now(), prompt, output, status, error, asked=self._asked, answered=answer.text
        )

    async def _follow(self, clock: Clock) -> tuple[Status, str]:
        endpoint = self._endpoint
        headers = endpoint.headers | {"x-request-id": self._name}
        async with endpoint.http.post(endpoint.url, data=self._body, headers=headers) as response:
            if response.status != 200:
                return await _refusal(response)
            if response.content_type != "text/event-stream":
                raise WireError(f"an answer of type {response.content_type}, not text/event-stream")
            events, answer, limit = EventStream(), self._answer, self._request.cancel_after
            async for received in response.content.iter_any():
                now = clock.now()
                for data in events.feed(received):
                    if answer.add(data):
                        self._times.append(now)
                    if answer.error is not None:
                        return "server_error", answer.error
                    if limit is not None and len(self._times) >= limit and not answer.finished:
                        response.close()
                        return "cancelled", ""
        if not self._times:
            raise WireError("an answer without a token")
        if not answer.finished:
            return "disconnected", "the answer ended before its end was told"
        return "ok", ""


async def _refusal(response: aiohttp.ClientResponse) -> tuple[Status, str]:
    message = f"HTTP {response.status}: {error_message(_json_or_text(await response.text(errors='replace')))}"
    return "rejected" if response.status < 500 else "server_error", message


def headers_of(target: OpenAITarget) -> dict[str, str]:
    """Raises ConfigError where the variable that ought to hold the key is not set."""
    key = client_key() if target.api_key_env is None else os.environ.get(target.api_key_env)
    if target.api_key_env is not None and not key:
        raise ConfigError(f"target.api_key_env: the environment has no {target.api_key_env}")
    if not key or any(name.lower() == "authorization" for name in target.headers):
        return dict(target.headers)
    return {"authorization": f"Bearer {key}"} | target.headers


def describe(error: BaseException) -> str:
    """A transport's error in one line."""
    if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error.os_error, ssl.SSLError):
        return (os.strerror(error.os_error.errno) if error.os_error.errno else str(error.os_error)).lower()
    return " ".join(str(error).split())[:200] or type(error).__name__


def _json_or_text(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
