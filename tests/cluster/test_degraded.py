"""Degraded mode over HTTP: a second router, beside the session's, while the only replica of one expert hangs."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from session_cluster import DEMO_CHECKPOINT, Cluster

from expertmesh.artifact.manifest import read_manifest
from expertmesh.cluster.record import Record
from expertmesh.cluster.serve_api import ServeApi
from expertmesh.config import GroupSection, load_config
from expertmesh.deployment import serve_config
from expertmesh.directory.client import list_table
from expertmesh.experts import format_indices
from loadtest.sampling import ray_pages
from router_service.metrics import DEGRADED_RESPONSES

pytestmark = pytest.mark.cluster
LAYER, EXPERT = 1, 2
"""Of group a; not all prompts need it. Another group serves what else a has, so that it alone is away with a."""
ROUTER, PREFIX = "degraded", "/degraded"
ENGINE = {
    "degrade_after_s": 1,
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "kwargs": {"block_size": 32, "num_gpu_blocks_override": 17},
}
"""Too few blocks for all that is asked at once."""
KINDS = ("completions", "chat/completions")
FORMS = list(product(KINDS, (False, True), (1, 2)))
"""Path, whether it is streamed, n."""
PATIENCE_S = 120.0


@dataclass
class Response:
    """To one request."""

    prompt: list[int] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    """Of each choice."""
    marks: list[bool] = field(default_factory=list)
    """Of the body or of each chunk."""
    lengths: list[dict[int, int]] = field(default_factory=list)
    """How many tokens of each choice had come with the body or chunk and before."""

    def take(self, body: dict[str, Any]) -> None:
        assert body.get("expertmesh") in (None, {"degraded": True}), body
        for choice in body["choices"]:
            self.prompt = choice.get("prompt_token_ids") or body.get("prompt_token_ids") or self.prompt
            self.tokens.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
        self.marks.append("expertmesh" in body)
        self.lengths.append({index: len(tokens) for index, tokens in self.tokens.items()})


@dataclass
class Client:
    url: str
    http: httpx.Client

    def ask(self, path: str, prompt: str, stream: bool = False, n: int = 1, max_tokens: int = 8) -> Response:
        what = {"prompt": prompt} if path == "completions" else {"messages": [{"role": "user", "content": prompt}]}
        sampling = {"temperature": 0.0} if n == 1 else {"temperature": 0.7, "seed": 3}
        body = {"model": "demo", "n": n, "stream": stream, "max_tokens": max_tokens, "ignore_eos": True}
        found = Response()
        given = body | what | sampling | {"return_token_ids": True}
        with self.http.stream("POST", f"{self.url}/v1/{path}", json=given) as answer:
            text = answer.read().decode()
        assert answer.status_code == 200, text
        if not stream:
            found.take(json.loads(text))
            return found
        *events, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert done == "[DONE]"
        for event in events:
            found.take(json.loads(event))
        return found

    def ask_all(self) -> dict[tuple[str, bool, int], list[Response]]:
        with ThreadPoolExecutor(12) as pool:
            asked = {
                form: [pool.submit(self.ask, form[0], prompt, *form[1:]) for prompt in prompts(form[0])]
                for form in FORMS
            }
            return {form: [one.result() for one in several] for form, several in asked.items()}

    def ask_long(self) -> list[Response]:
        """More at once than the KV cache holds to their ends."""
        with ThreadPoolExecutor(12) as pool:
            return list(pool.map(lambda prompt: self.ask("completions", prompt, max_tokens=48), prompts("completions")))


def prompts(path: str) -> list[str]:
    kinds: dict[str, list[str]] = json.loads((DEMO_CHECKPOINT / "prompts.json").read_text())
    if path != "completions":
        return [*kinds["chat"][:3], "Hello", "Who are you?", "What is 2 + 3?", "1+1"]
    return [prompt for kind in kinds.values() for prompt in kind[:2]]


class Oracle:
    """The demo model in transformers, whole or with the expert's weight given to the others."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        from expertmesh.artifact.modules import find_expert_layers

        self._model = AutoModelForCausalLM.from_pretrained(DEMO_CHECKPOINT, dtype=torch.float32).eval()
        module = sorted(find_expert_layers(self._model), key=lambda layer: layer.index)[LAYER].module
        module.register_forward_pre_hook(self._note)
        self._masked = False
        self._chosen: list[bool] = []

    def _note(self, _: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        rows, ids, weights = inputs
        self._chosen = (ids == EXPERT).any(-1).tolist()
        left = weights * (ids != EXPERT)
        return (
            (rows, ids, left * weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True)) if self._masked else inputs
        )

    @torch.no_grad()
    def needed_from(self, prompt: list[int], tokens: list[int]) -> int | None:
        """The first of the tokens, counted from 1, whose row or one before it needs the expert; None: none does."""
        self._masked = True
        self._model(torch.tensor([prompt + tokens[:-1]]))
        if True not in self._chosen:
            return None
        return max(1, self._chosen.index(True) - len(prompt) + 2)

    @torch.no_grad()
    def greedy(self, response: Response, masked: bool) -> bool:
        """Whether its tokens are the most likely ones."""
        self._masked = masked
        (tokens,) = response.tokens.values()
        logits = self._model(torch.tensor([response.prompt + tokens[:-1]])).logits[0, len(response.prompt) - 1 :]
        return bool(logits.argmax(-1).tolist() == tokens)


@dataclass
class Answers:
    without: dict[tuple[str, bool, int], list[Response]]
    long: list[Response]
    between: list[Response]
    """While the replica came back."""
    after: dict[tuple[str, bool, int], list[Response]]

    @property
    def marked(self) -> int:
        every = [*(one for several in self.without.values() for one in several), *self.long, *self.between]
        return sum(any(one.marks) for one in every)


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    config = load_config(cluster.config)
    manifest = read_manifest(config.model.artifact)
    held = config.groups[0].expert_sets(manifest)
    rest = {
        str(layer): format_indices(experts - ({EXPERT} if layer == sorted(held)[LAYER] else set()))
        for layer, experts in held.items()
    }
    groups = (*config.groups, GroupSection.model_validate({"name": "rest", "experts": rest}))
    engine = config.engine.model_validate(config.engine.model_dump() | ENGINE)
    api = ServeApi(cluster.dashboard, cluster.token)
    before = serve_config(config, manifest)
    wanted = serve_config(config.model_copy(update={"groups": groups}), manifest)
    (router,) = serve_config(config.model_copy(update={"engine": engine}), manifest)["applications"][-1:]
    wanted["applications"].append(router | {"name": ROUTER, "route_prefix": PREFIX})

    def until_running(applications: list[dict[str, Any]]) -> None:
        wanted, deadline = {one["name"]: "RUNNING" for one in applications}, time.monotonic() + PATIENCE_S
        while (found := {name: one["status"] for name, one in api.details()["applications"].items()}) != wanted:
            assert time.monotonic() < deadline, found
            time.sleep(0.3)

    try:
        api.deploy(wanted)
        until_running(wanted["applications"])
        with httpx.Client(timeout=PATIENCE_S, trust_env=False) as http:
            yield Client(f"{cluster.http}{PREFIX}", http)
    finally:
        api.deploy(before)
        until_running(before["applications"])


@pytest.fixture(scope="module")
def answers(cluster: Cluster, client: Client) -> Answers:
    (pid,) = (one.pid for one in list_table(cluster.directory).replicas if one.group == "a")
    os.kill(pid, signal.SIGSTOP)
    try:
        without, long = client.ask_all(), client.ask_long()
    finally:
        os.kill(pid, signal.SIGCONT)
    concerned = next(
        prompt for prompt, one in zip(prompts("completions"), without[FORMS[0]], strict=True) if any(one.marks)
    )
    between, deadline = [client.ask("completions", concerned)], time.monotonic() + PATIENCE_S
    while any(between[-1].marks):
        assert time.monotonic() < deadline
        between.append(client.ask("completions", concerned))
    return Answers(without, long, between, client.ask_all())


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def check(oracle: Oracle, response: Response) -> bool:
    """Marked from where the expert is needed on, and only where it is; whether it is."""
    first = {index: oracle.needed_from(response.prompt, tokens) for index, tokens in response.tokens.items()}
    needed = any(one is not None for one in first.values())
    assert response.marks == sorted(response.marks) and response.marks[-1] == needed
    for mark, lengths in zip(response.marks, response.lengths, strict=True):
        with_it = any(start is not None and lengths.get(index, 0) >= start for index, start in first.items())
        assert mark or not with_it
    return needed


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]}-{'stream' if form[1] else 'body'}-n{form[2]}")
def test_answers_go_on_and_those_that_need_the_expert_alone_are_marked(
    answers: Answers, oracle: Oracle, form: tuple[str, bool, int]
) -> None:
    responses = answers.without[form]
    for one in responses:
        assert [len(tokens) for tokens in one.tokens.values()] == [8] * form[2]
    assert {check(oracle, one) for one in responses} == {True, False}
    assert all(oracle.greedy(one, masked=True) for one in responses if form[2] == 1)


def test_so_it_is_where_requests_make_way_for_others(answers: Answers, oracle: Oracle) -> None:
    assert {check(oracle, one) for one in answers.long} == {True, False}
    assert all(oracle.greedy(one, masked=True) for one in answers.long)


def test_once_the_replica_is_back_nothing_is_marked_and_all_is_whole(answers: Answers, oracle: Oracle) -> None:
    for (_, _, n), responses in answers.after.items():
        assert not any(mark for one in responses for mark in one.marks)
        assert all(oracle.greedy(one, masked=False) for one in responses if n == 1)


def test_the_metric_counts_each_marked_response_once(cluster: Cluster, answers: Answers) -> None:
    path = Path(cluster.environment["XDG_STATE_HOME"]) / "expertmesh" / "tests" / "cluster.json"
    pages = ray_pages(Record.model_validate_json(path.read_bytes()))

    def total(name: str) -> float:
        lines = [
            line for page in pages for line in httpx.get(f"http://{page}/metrics", trust_env=False).text.splitlines()
        ]
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"ray_{name}{{"))

    deadline = time.monotonic() + PATIENCE_S
    while total(DEGRADED_RESPONSES.name) < answers.marked:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert total(DEGRADED_RESPONSES.name) == answers.marked
    assert total("vllm_num_preemptions_total") > 0, "no request made way for another"
