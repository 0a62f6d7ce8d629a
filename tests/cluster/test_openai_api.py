"""The whole cluster over HTTP, with the official client: what a user of vLLM's API expects."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from session_cluster import Cluster

pytestmark = pytest.mark.cluster

PROMPT = "def fibonacci(n):"


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0, timeout=180)


def complete(client: openai.OpenAI, prompt: str = PROMPT, **more: Any) -> Any:
    return client.completions.create(model="demo", prompt=prompt, **{"max_tokens": 24, "temperature": 0} | more)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


def test_code_continues_as_code(client: openai.OpenAI) -> None:
    done = complete(client)
    assert done.usage.completion_tokens == 24
    assert done.choices[0].finish_reason == "length"
    assert done.choices[0].text.startswith("\n    ")


def test_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is 2 + 3?"}]
    done = client.chat.completions.create(model="demo", messages=messages, max_tokens=24, temperature=0)
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].message.content


def test_streaming_gives_the_same_text(client: openai.OpenAI) -> None:
    chunks = list(complete(client, stream=True))
    assert len(chunks) > 5
    assert "".join(chunk.choices[0].text for chunk in chunks) == complete(client).choices[0].text


def test_stop(client: openai.OpenAI) -> None:
    text = complete(client).choices[0].text
    word = text.split()[1]
    stopped = complete(client, stop=[word]).choices[0]
    assert stopped.text == text[: text.index(word)]
    assert stopped.finish_reason == "stop"


def test_n_gives_different_samples(client: openai.OpenAI) -> None:
    choices = complete(client, n=3, temperature=1.0, seed=1).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({choice.text for choice in choices}) > 1


def test_a_seed_repeats_a_sample(client: openai.OpenAI) -> None:
    once, again, other = (complete(client, temperature=1.0, seed=seed).choices[0].text for seed in (7, 7, 8))
    assert once == again != other


def test_logprobs(client: openai.OpenAI) -> None:
    logprobs = complete(client, logprobs=3).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 24
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == pytest.approx(max(top.values())), "greedy takes the most likely"


def test_structured_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    messages: Any = [{"role": "user", "content": "a number"}]
    done = client.chat.completions.create(
        model="demo", messages=messages, response_format=form, max_tokens=64, temperature=0
    )
    assert 0 <= json.loads(str(done.choices[0].message.content))["n"] <= 9


def test_many_at_once_equal_one_at_a_time(client: openai.OpenAI) -> None:
    prompts = ["import os\n", "The king said", '{"name": "', "12 + 7 =", PROMPT, "class Node:"]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt).choices[0].text, prompts))
    same = sum(one == other for one, other in zip(alone, together, strict=True))
    assert same >= len(prompts) - 1, "bf16 kernels differ by batch size; more than one such case is a mix-up of rows"


def test_an_unknown_model_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.completions.create(model="nope", prompt="x")


def test_a_prompt_that_is_too_long_is_refused_with_the_limit(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as refused:
        complete(client, "a b " * 600)
    message = refused.value.body["message"]  # type: ignore[index]
    assert "\n" not in message and "Internal exception" not in message


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"model": "demo"}',
        b'{"model": "demo", "prompt": "x", "messages": [], "max_tokens": "many"}',
        b'{"model": "demo", "prompt": "x", "messages": [], "max_tokens": NaN}',
        b'{"model": "demo", "prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "demo", "prompt": [-1], "messages": [{"role": "user", "content": [{"type": "odd"}]}]}',
        b'{"model": "demo:odd", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}',
    ],
)
def test_malformed_requests_get_a_4xx_in_one_line(cluster: Cluster, path: str, body: bytes) -> None:
    answer = httpx.post(f"{cluster.http}/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["message"].strip()
    assert "\n" not in answer.json()["error"]["message"]
