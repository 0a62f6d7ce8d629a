"""The committed demo checkpoint holds what its card promises. Needs neither the corpus nor vLLM."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from examples.demo_model.chat import render
from examples.demo_model.evaluate import Demo, compiles, load
from examples.demo_model.train import CHECKPOINT

DOMAINS = ("python", "prose", "data", "arithmetic")


@pytest.fixture(scope="module")
def demo() -> Demo:
    torch.set_num_threads(1)
    return load(CHECKPOINT)


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[str]]:
    loaded: dict[str, list[str]] = json.loads((CHECKPOINT / "prompts.json").read_text())
    return loaded


@dataclass(frozen=True)
class Run:
    """One domain's prompts through the model: predicted tokens (T,), their loss in nats, rows per expert (L, E)."""

    targets: torch.Tensor
    loss: float
    counts: torch.Tensor


@pytest.fixture(scope="module")
def runs(demo: Demo, prompts: dict[str, list[str]]) -> dict[str, Run]:
    measured = {}
    for domain in DOMAINS:
        rows = [torch.tensor(demo.tokenizer(text)["input_ids"]) for text in prompts[domain]]
        losses, counts = zip(*(demo.run(row[None]) for row in rows), strict=True)
        measured[domain] = Run(torch.cat([row[1:] for row in rows]), sum(losses), torch.stack(counts).sum(0))
    return measured


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_architecture(demo: Demo) -> None:
    config = demo.model.config
    assert config.architectures == ["Qwen3MoeForCausalLM"]
    assert demo.layers >= 4
    assert (demo.experts, config.num_experts_per_tok) == (16, 2)
    assert all(hasattr(layer.mlp, "experts") for layer in demo.model.model.layers)
    assert 8e6 <= sum(parameter.numel() for parameter in demo.model.parameters()) <= 12e6
    assert folder_bytes(CHECKPOINT) <= 25e6


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_unigram_does_as_well(runs: dict[str, Run], prompts: dict[str, list[str]], domain: str) -> None:
    """Even the unigram that was fitted to these very prompts, the best that there can be, has twice the perplexity."""
    targets = runs[domain].targets
    frequencies = torch.bincount(targets).double() / len(targets)
    best_unigram = math.exp(torch.special.entr(frequencies).sum().item())
    assert len(prompts[domain]) >= 16
    assert math.exp(runs[domain].loss / len(targets)) < best_unigram / 2


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_loads_some_experts_three_times_as_much(demo: Demo, runs: dict[str, Run], domain: str) -> None:
    counts = runs[domain].counts
    assert torch.all(counts.max(1).values >= 3 * counts.min(1).values)
    written = json.loads((CHECKPOINT / "expert_shares.json").read_text())["shares"][domain]
    assert len(written) == demo.layers
    assert all(max(layer) >= 3 * min(layer) and sum(layer) == pytest.approx(1, abs=0.01) for layer in written)


def test_domains_prefer_different_experts(runs: dict[str, Run]) -> None:
    favourites = {tuple(runs[domain].counts.argmax(1).tolist()) for domain in DOMAINS}
    assert len(favourites) == len(DOMAINS)


def test_code_goes_on_as_code(demo: Demo) -> None:
    prompt = "class Node:\n    def __init__(self, name, parent=None):\n        self.name = name"
    continuation = demo.complete(prompt, 48)
    assert "        self." in continuation
    assert compiles(prompt, continuation)


def test_the_chat_template_renders_what_was_trained(demo: Demo) -> None:
    turns = [("user", "What is 1 + 2?"), ("assistant", "1 + 2 = 3"), ("user", "Thank you")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = demo.tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == render(turns) + "<|endoftext|>\n"
    asked = demo.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == rendered + "<|assistant|>\n"
    assert demo.tokenizer.eos_token_id == demo.model.generation_config.eos_token_id


def test_a_chat_turn_ends(demo: Demo) -> None:
    turns = [{"role": "user", "content": "What is 2 + 3?"}]
    ids = demo.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = demo.model.generate(**ids, max_new_tokens=32, do_sample=False)[0].tolist()
    assert made[-1] == demo.tokenizer.eos_token_id
    assert "2 + 3 =" in demo.tokenizer.decode(made[ids["input_ids"].shape[1] :])
