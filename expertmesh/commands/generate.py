"""`expertmesh generate`: one prompt from the shell, its tokens as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import openai
import typer

from expertmesh.api_keys import client_key
from expertmesh.cluster import record
from expertmesh.errors import ClusterError


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="As a message of a chat, through the model's template.")] = False,
    model: Annotated[str | None, typer.Option(help="Name of the model; default: the cluster's.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Cluster's name; default: the only one.")] = None,
    url: Annotated[
        str | None, typer.Option(help="An OpenAI API instead of a cluster's, e.g. http://host:8000/v1.")
    ] = None,
) -> None:
    """Generate text with a running cluster. Where it asks for API keys, set OPENAI_API_KEY.

    Example: expertmesh generate --max-tokens 40 "def fibonacci(n):"
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if url is None:
        known = record.require(cluster)
        url, model = f"{known.http}/v1", model or known.model
    elif model is None:
        raise ClusterError("--url needs --model")
    for piece in stream(url, model, text, max_tokens=max_tokens, temperature=temperature, seed=seed, chat=chat):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


def stream(
    url: str, model: str, prompt: str, *, max_tokens: int, temperature: float, seed: int | None, chat: bool
) -> Iterator[str]:
    """Pieces of the answer as they come; raises ClusterError with one line where the API refuses or does not answer."""
    client = openai.OpenAI(base_url=url, api_key=client_key() or "none", max_retries=0)
    options = {"model": model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stream": True}
    try:
        if chat:
            messages = [{"role": "user", "content": prompt}]
            for chunk in client.chat.completions.create(messages=messages, **options):
                yield (chunk.choices[0].delta.content or "") if chunk.choices else ""
        else:
            for chunk in client.completions.create(prompt=prompt, **options):
                yield chunk.choices[0].text if chunk.choices else ""
    except openai.APIStatusError as error:
        raise ClusterError(f"{url}: {error.status_code}: {_message(error)}") from None
    except openai.APIError as error:
        raise ClusterError(f"{url}: {error.message}") from None


def _message(error: openai.APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    lines = str(body.get("message") or error.message).splitlines()
    return lines[0] if lines else type(error).__name__
