"""Concurrent streams of completions against an OpenAI API."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import openai

from expertmesh.errors import ClusterError


@dataclass(frozen=True)
class Answer:
    tokens: int
    first_token_s: float


@dataclass(frozen=True)
class Figures:
    answers: int
    tokens: int
    seconds: float
    first_token_ms: float
    """Median over the answers."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def run_load(url: str, model: str, prompts: Sequence[str], concurrency: int, max_tokens: int) -> Figures:
    """Sends every prompt once, `concurrency` at a time, greedily and to the full length; raises ClusterError."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
    began = time.perf_counter()
    try:
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(pool.map(lambda prompt: _complete(client, model, prompt, max_tokens), prompts))
    except openai.APIError as error:
        raise ClusterError(f"{url}: {error.message}") from None
    seconds = time.perf_counter() - began
    first_token_ms = 1000 * statistics.median(answer.first_token_s for answer in answers)
    return Figures(len(answers), sum(answer.tokens for answer in answers), seconds, first_token_ms)


def _complete(client: openai.OpenAI, model: str, prompt: str, max_tokens: int) -> Answer:
    began, first_token_s, tokens = time.perf_counter(), 0.0, 0
    chunks = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    for chunk in chunks:
        if chunk.choices and not first_token_s:
            first_token_s = time.perf_counter() - began
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    return Answer(tokens, first_token_s)
