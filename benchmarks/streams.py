"""Streams of completions at a fixed concurrency, and what a client sees of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from benchmarks.measure import median
from expertmesh.errors import ClusterError

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Stream:
    """Times of one answer, seconds."""

    first_token_s: float
    last_token_s: float
    tokens: int

    @property
    def inter_token_s(self) -> float:
        """The mean gap after the first token."""
        return (self.last_token_s - self.first_token_s) / max(1, self.tokens - 1)


@dataclass(frozen=True)
class Round:
    """Prompts sent at once, until the last answer has ended."""

    tokens_per_s: float
    first_token_ms: float
    inter_token_ms: float


def run_round(url: str, model: str, prompts: Sequence[Sequence[int]], tokens: int) -> Round:
    """Sends all prompts (token ids) at once, each for exactly `tokens` tokens; medians over the answers.

    Raises ClusterError where an answer is none or not that long.
    """
    seconds, streams = asyncio.run(_all(f"{url}/v1/completions", model, prompts, tokens))
    return Round(
        len(prompts) * tokens / seconds,
        1e3 * median([one.first_token_s for one in streams]),
        1e3 * median([one.inter_token_s for one in streams]),
    )


async def _all(url: str, model: str, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[Stream]]:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        began = time.perf_counter()
        streams = await asyncio.gather(*(_one(session, url, model, prompt, tokens) for prompt in prompts))
        return time.perf_counter() - began, streams


async def _one(session: aiohttp.ClientSession, url: str, model: str, prompt: Sequence[int], tokens: int) -> Stream:
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first = last = 0.0
    usage = b"{}"
    began = time.perf_counter()
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                raise ClusterError(f"{url}: {response.status} {(await response.text())[:200]}")
            async for line in response.content:
                if b'"choices":[]' in line:
                    usage = line.removeprefix(b"data: ")
                elif line.startswith(b"data: {"):
                    last = time.perf_counter() - began
                    first = first or last
    except aiohttp.ClientError as error:
        raise ClusterError(f"{url}: {error}") from None
    got = json.loads(usage).get("usage", {}).get("completion_tokens", 0)
    if got != tokens:
        raise ClusterError(f"{url}: an answer of {got} tokens instead of {tokens}")
    return Stream(first, last, got)
