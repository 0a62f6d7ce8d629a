"""Answers of the demo model as a client sees them: which tokens came when. Used by `rebalance` and `chaos`."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import torch
from safetensors.torch import load_file, save_file

from examples import demo
from expertmesh.artifact.prepare import prepare
from expertmesh.cluster.record import Record
from expertmesh.errors import ClusterError


@dataclass
class Answer:
    """A streamed completion; moments are seconds of time.perf_counter."""

    prompt: int
    sent: float = field(default_factory=time.perf_counter)
    tokens: list[int] = field(default_factory=list)
    pieces: list[tuple[float, int]] = field(default_factory=list)
    """When each piece came, and its tokens."""
    failure: str = ""
    refused: str = ""
    """What a 429 said: there were too many at once."""

    @property
    def done(self) -> bool:
        return not self.failure and not self.refused

    @property
    def ended(self) -> float:
        return self.pieces[-1][0] if self.pieces else self.sent

    def gaps(self) -> list[tuple[float, float]]:
        """Between two pieces: when it ended, and its length in seconds."""
        times = [when for when, _ in self.pieces]
        return [(later, later - earlier) for earlier, later in itertools.pairwise(times)]

    def differing(self, expected: Sequence[int]) -> int:
        """Tokens from the first that differs on."""
        same = next((at for at, (a, b) in enumerate(zip(self.tokens, expected, strict=False)) if a != b), None)
        return abs(len(self.tokens) - len(expected)) if same is None else len(expected) - same


def expectations(answers: Iterable[Answer]) -> dict[int, list[int]]:
    """Prompt -> tokens of the first whole answer to it."""
    found: dict[int, list[int]] = {}
    for one in answers:
        if one.done:
            found.setdefault(one.prompt, one.tokens)
    return found


def differing(answers: Iterable[Answer], expected: Mapping[int, Sequence[int]]) -> int:
    """Over all whole answers."""
    return sum(one.differing(expected[one.prompt]) for one in answers if one.done)


async def complete(
    session: aiohttp.ClientSession, target: Record, prompts: Sequence[str], number: int, max_tokens: int
) -> Answer:
    """Streams a greedy completion of just so many tokens; what fails is noted in the answer."""
    answer = Answer(number)
    try:
        await _stream(session, target, prompts[number], max_tokens, answer)
    except (aiohttp.ClientError, ClusterError, TimeoutError) as error:
        answer.failure = f"{type(error).__name__}: {error}"
    return answer


async def _stream(session: aiohttp.ClientSession, target: Record, prompt: str, max_tokens: int, answer: Answer) -> None:
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async with session.post(f"{target.http}/v1/completions", json=body) as response:
        if response.status == 429:
            answer.refused = (await response.text())[:200]
            return
        if response.status != 200:
            raise ClusterError(f"{response.status} {(await response.text())[:200]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "choices" not in chunk:
                raise ClusterError(line.decode()[:200])
            new = [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]
            if new:
                answer.pieces.append((time.perf_counter(), len(new)))
                answer.tokens += new
    if len(answer.tokens) != max_tokens:
        raise ClusterError(f"an answer of {len(answer.tokens)} tokens instead of {max_tokens}")


def wake_at_once() -> bool:
    """Real-time priority for this process, the clients, where that is allowed: what is measured shall be when the
    server sent, not when a busy machine let the client read. What it starts has the usual priority."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        return False
    return True


def make_artifact(folder: Path) -> Path:
    """The demo's checkpoint in fp32 and its artifact, made in `folder` where they are not there yet."""
    checkpoint, artifact = folder / "checkpoint", folder / "artifact"
    if not (artifact / "manifest.json").exists():
        checkpoint.mkdir(parents=True, exist_ok=True)
        for path in demo.CHECKPOINT.glob("*.json"):
            (checkpoint / path.name).write_bytes(path.read_bytes())
        config = json.loads((demo.CHECKPOINT / "config.json").read_text()) | {"dtype": "float32"}
        (checkpoint / "config.json").write_text(json.dumps(config))
        tensors = load_file(demo.CHECKPOINT / "model.safetensors")
        wide = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
        save_file(wide, checkpoint / "model.safetensors", metadata={"format": "pt"})
        prepare(checkpoint, artifact)
    return artifact
