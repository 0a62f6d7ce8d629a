"""Measures the checkpoint on held-out text and writes what the model card says: no figure there is typed by hand.

Examples:
  python -m examples.demo_model.evaluate --sources build/sources         # measures, writes the card and JSON files
  python -m examples.demo_model.evaluate --sources build/sources --print # measures and only prints
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo_model.arithmetic import draw_from
from examples.demo_model.card import write_card
from examples.demo_model.corpus import DOMAINS, Document, MissingSource, documents
from examples.demo_model.prompts import PROMPTS_PER_DOMAIN, held_out_prompts
from examples.demo_model.train import CHECKPOINT

WINDOW = 256
CODE_TOKENS = 96
SUMS = 60


@dataclass(frozen=True)
class Demo:
    """A loaded checkpoint; `model` is a causal language model of transformers, in float32 for a stable measure."""

    model: Any
    tokenizer: Any

    @property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def experts(self) -> int:
        return int(self.model.config.num_experts)

    def stream(self, texts: Sequence[str]) -> torch.Tensor:
        """Token ids (T,) of the texts, each followed by the end-of-text token."""
        ids = [[*row, self.tokenizer.eos_token_id] for row in self.tokenizer(list(texts), verbose=False)["input_ids"]]
        return torch.tensor([token for row in ids for token in row])

    @torch.inference_mode()
    def run(self, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Summed loss in nats of ids (B, S) after each row's first, and rows per (layer, expert) as counts (L, E)."""
        outputs = self.model(input_ids=ids, output_router_logits=True, use_cache=False)
        losses = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
        )
        counts = [
            torch.bincount(logits.topk(self.model.config.num_experts_per_tok).indices.flatten(), minlength=self.experts)
            for logits in outputs.router_logits
        ]
        return losses.item(), torch.stack(counts)

    @torch.inference_mode()
    def complete(self, prompt: str, tokens: int) -> str:
        """Greedy continuation of `prompt`, up to the end-of-text token."""
        ids = self.tokenizer(prompt, return_tensors="pt")
        made = self.model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        return str(self.tokenizer.decode(made[0][ids["input_ids"].shape[1] :], skip_special_tokens=True))


def load(checkpoint: Path) -> Demo:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return Demo(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval(), tokenizer)


def windows(stream: torch.Tensor, number: int) -> torch.Tensor:
    """At most `number` rows (B, WINDOW) of the stream, evenly spread."""
    rows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    chosen = torch.linspace(0, len(rows) - 1, min(number, len(rows))).long()
    return rows[chosen]


def unigram_perplexity(training: torch.Tensor, rows: torch.Tensor, vocabulary: int) -> float:
    """Perplexity of the rows' predicted tokens under the domain's own token frequencies, with one added to each."""
    counts = torch.bincount(training, minlength=vocabulary).double() + 1
    return float(torch.exp(-(counts / counts.sum()).log()[rows[:, 1:].flatten()].mean()))


def measure_domain(demo: Demo, texts: Sequence[Document], domain: str, number: int) -> dict[str, Any]:
    """Perplexities and expert shares of one domain's held-out text; shares are fractions of (token, expert) rows."""
    held_out, training = (
        demo.stream([text.text for text in texts if text.domain == domain and text.held_out == split])
        for split in (True, False)
    )
    rows = windows(held_out, number)
    runs = [demo.run(batch) for batch in torch.split(rows, 8)]
    predicted = rows[:, 1:].numel()
    characters = len(demo.tokenizer.decode(rows.flatten()))
    nats = sum(loss for loss, _ in runs)
    counts = torch.stack([count for _, count in runs]).sum(0)
    return {
        "tokens": predicted,
        "perplexity": round(float(torch.exp(torch.tensor(nats / predicted))), 2),
        "unigram_perplexity": round(unigram_perplexity(training, rows, len(demo.tokenizer)), 1),
        "bits_per_character": round(nats / 0.6931 * rows.numel() / predicted / characters, 2),
        "shares": [[round(share, 4) for share in layer] for layer in (counts / counts.sum(1, keepdim=True)).tolist()],
    }


def measure_sums(demo: Demo, number: int = SUMS) -> dict[str, float]:
    """Share of held-out sums whose greedy answer is right, after three sums of the training split, by operator."""
    right = {}
    for operator in "+-*/":
        source = random.Random(operator)
        correct = 0
        for _ in range(number):
            shown = [draw_from(source, False, operator) for _ in range(3)]
            asked = draw_from(source, True, operator)
            prompt = "".join(f"{made.question} = {made.answer}\n" for made in shown) + f"{asked.question} ="
            correct += demo.complete(prompt, 5).split("\n")[0].strip() == str(asked.answer)
        right[operator] = correct / number
    return right


def compiles(prompt: str, continuation: str) -> bool:
    """Whether the prompt and the continuation's whole lines, less at most three of them, are a valid Python module."""
    lines = continuation.splitlines()[:-1]
    for end in range(len(lines), max(0, len(lines) - 4), -1):
        if not "".join(lines[:end]).strip():
            return False
        try:
            compile("\n".join([prompt + lines[0], *lines[1:end], ""]), "continuation", "exec", dont_inherit=True)
            return True
        except (SyntaxError, ValueError):
            continue
    return False


def measure_code(demo: Demo, prompts: Sequence[str]) -> dict[str, Any]:
    """Continuations of code prompts, and the share of them that compile with their prompt."""
    made = [(prompt, demo.complete(prompt, CODE_TOKENS)) for prompt in prompts]
    good = sum(compiles(prompt, text) for prompt, text in made)
    return {"prompts": len(made), "compile": good, "code_tokens": CODE_TOKENS, "continuations": made[:4]}


def measure(demo: Demo, texts: Sequence[Document], prompts: dict[str, list[str]], number: int) -> dict[str, Any]:
    """All that the card reports of the model itself."""
    domains = {domain: measure_domain(demo, texts, domain, number) for domain in DOMAINS}
    asked = [[{"role": "user", "content": text}] for text in ("What is 27 + 15?", "Who are you?", "What is 9 * 8?")]
    chats = [demo.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in asked]
    return {
        "parameters": sum(parameter.numel() for parameter in demo.model.parameters()),
        "domains": domains,
        "sums_of_each_kind": SUMS,
        "sums": measure_sums(demo),
        "code": measure_code(demo, prompts["python"]),
        "chat": [[turns[0]["content"], demo.complete(chat, 48)] for turns, chat in zip(asked, chats, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, default=Path("/"), metavar="DIR", help="the unpacked packages [/]")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="DIR", help="[beside this file]")
    parser.add_argument("--windows", type=int, default=64, help=f"held-out rows of {WINDOW} tokens per domain [64]")
    parser.add_argument("--print", action="store_true", help="print the measure and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        texts = documents(options.sources)
    except MissingSource as error:
        sys.exit(f"evaluate: {error}")
    demo = load(options.checkpoint)
    prompts = held_out_prompts(texts, demo.tokenizer, PROMPTS_PER_DOMAIN)
    measured = measure(demo, texts, prompts, options.windows)
    if options.print:
        print(json.dumps(measured, indent=1))
        return
    (options.checkpoint / "prompts.json").write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n")
    write_card(options.checkpoint, measured)


if __name__ == "__main__":
    main()
