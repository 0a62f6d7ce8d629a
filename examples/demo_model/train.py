"""Trains the demo model on one core, with progress and ETA; a run that was stopped goes on where it was.

Examples:
  python -m examples.demo_model.corpus --fetch build/sources
  python -m examples.demo_model.train --sources build/sources --work build/demo_model
  python -m examples.demo_model.train --sources build/sources --work build/smoke --out build/smoke/out --steps 20
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from examples.demo_model.corpus import DOMAINS, Document, MissingSource, documents
from examples.demo_model.losses import NextToken, balance
from examples.demo_model.model import new_model, train_tokenizer

CHECKPOINT = Path(__file__).parent / "checkpoint"
ROWS = {"python": 5, "prose": 3, "data": 3, "arithmetic": 3, "chat": 2}


@dataclass(frozen=True)
class Schedule:
    """Steps, learning rates and the weight of the balance loss; the last part of the steps sees twice the context."""

    steps: int = 1800
    warmup: int = 100
    decay_share: float = 0.22
    peak_rate: float = 2.5e-3
    balance_weight: float = 0.02
    tokens_per_row: int = 256
    long_share: float = 0.2
    seed: int = 1

    def rate(self, step: int) -> float:
        """Linear warm-up, a plateau, then a linear decay to nought over the last share of the steps."""
        rising = (step + 1) / self.warmup
        falling = (self.steps - step) / (self.steps * self.decay_share)
        return self.peak_rate * min(1.0, rising, falling)

    def is_long(self, step: int) -> bool:
        return step >= self.steps * (1 - self.long_share)


class Tokens:
    """The training text of every domain as one stream of token ids; each document ends with the end-of-text token."""

    def __init__(self, texts: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> None:
        self.streams: dict[str, torch.Tensor] = {}
        order = numpy.random.default_rng(0).permutation(len(texts))
        for domain in ROWS:
            chosen = [texts[i].text for i in order if texts[i].domain == domain and not texts[i].held_out]
            ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(chosen)["input_ids"]]
            self.streams[domain] = torch.tensor([token for row in ids for token in row], dtype=torch.int32)

    def batch(self, step: int, schedule: Schedule) -> torch.Tensor:
        """Rows (B, S + 1) of all domains, drawn by the seed and the step alone, so that a resumed run sees the same."""
        source = numpy.random.default_rng((schedule.seed, step))
        domains = [domain for domain, number in ROWS.items() for _ in range(number)]
        length = schedule.tokens_per_row
        if schedule.is_long(step):
            domains, length = [domains[i] for i in source.permutation(len(domains))[::2]], length * 2
        rows = []
        for domain in domains:
            start = int(source.integers(len(self.streams[domain]) - length))
            rows.append(self.streams[domain][start : start + length + 1])
        return torch.stack(rows).long()


class Optimizer:
    """AdamW on float32 copies of the model's bfloat16 parameters; norms and gates' scales do not decay."""

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self.parameters = list(model.parameters())
        self.masters = [parameter.detach().float().clone() for parameter in self.parameters]
        decayed = [master for master in self.masters if master.dim() > 1]
        kept = [master for master in self.masters if master.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), fused=True)

    def step(self, rate: float) -> float:
        """Applies the gradients, clipped to norm 1, and clears them; returns their norm before."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, 1.0))
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
        return norm

    def state(self) -> dict[str, Any]:
        return {"masters": self.masters, "adam": self.adam.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.masters, state["masters"])
            torch._foreach_copy_(self.parameters, self.masters)
        self.adam.load_state_dict(state["adam"])


def train_step(model: Qwen3MoeForCausalLM, batch: torch.Tensor, weight: float) -> tuple[float, float]:
    """Gradients of one batch (B, S + 1); returns the next-token loss in nats and the balance loss."""
    inputs, targets = batch[:, :-1], batch[:, 1:].flatten()
    outputs = model.model(input_ids=inputs, use_cache=False, output_router_logits=True)
    logits = model.lm_head(outputs.last_hidden_state).flatten(0, 1)
    loss: torch.Tensor = NextToken.apply(logits, targets)  # type: ignore[no-untyped-call]
    even = balance(outputs.router_logits, model.config.num_experts_per_tok)
    torch.autograd.backward(loss + weight * even)
    return loss.item(), even.item()


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A checkpoint that transformers and vLLM load."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)


def load_tokenizer(texts: Sequence[Document], work: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of an earlier run in `work`, or one trained on an equal sample of every domain's training text."""
    folder = work / "tokenizer"
    if folder.exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    sample: list[str] = []
    for domain in DOMAINS:
        chosen = [text.text for text in texts if text.domain == domain and not text.held_out]
        step = max(1, sum(map(len, chosen)) // 3_000_000)
        sample += chosen[::step]
    tokenizer = train_tokenizer(sample)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    return tokenizer


def train(schedule: Schedule, texts: Sequence[Document], work: Path, out: Path) -> None:
    """Runs the schedule from `work`'s last state on; the log is a JSON object per 10 steps in `work`/log.jsonl."""
    tokenizer = load_tokenizer(texts, work)
    tokens = Tokens(texts, tokenizer)
    model = new_model(tokenizer.eos_token_id, schedule.seed)
    optimizer = Optimizer(model)
    state_file, first, spent = work / "state.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        optimizer.load(state)
        first, spent = state["step"], state["seconds"]
        kept = [line for line in (work / "log.jsonl").read_text().splitlines() if json.loads(line)["step"] <= first]
        (work / "log.jsonl").write_text("".join(line + "\n" for line in kept))
    began, losses = time.monotonic() - spent, []
    for step in range(first, schedule.steps):
        losses.append(train_step(model, tokens.batch(step, schedule), schedule.balance_weight))
        norm = optimizer.step(schedule.rate(step))
        seconds = time.monotonic() - began
        if (step + 1) % 10 == 0:
            entry = summary(step + 1, losses, seconds)
            print(progress(entry, schedule.steps, norm), flush=True)
            with (work / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            losses = []
        if (step + 1) % 200 == 0 or step + 1 == schedule.steps:
            torch.save(optimizer.state() | {"step": step + 1, "seconds": seconds}, work / "state.new")
            (work / "state.new").replace(state_file)
            save(model, tokenizer, out)
            write_record(work, out, schedule, tokens)


def summary(step: int, losses: list[tuple[float, float]], seconds: float) -> dict[str, float]:
    """One entry of the log: means of the steps since the last one."""
    loss, even = (sum(column) / len(losses) for column in zip(*losses, strict=True))
    return {"step": step, "loss": round(loss, 4), "balance": round(even, 4), "seconds": round(seconds)}


def progress(entry: dict[str, float], steps: int, norm: float) -> str:
    left = entry["seconds"] / entry["step"] * (steps - entry["step"]) / 60
    shown = f"loss {entry['loss']:.3f} balance {entry['balance']:.3f} norm {norm:.2f}"
    return f"step {entry['step']}/{steps} {shown} ETA {left:.0f} min"


def write_record(work: Path, out: Path, schedule: Schedule, tokens: Tokens) -> None:
    """training.json beside the checkpoint: what the card says of the training."""
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    batch = sum(ROWS.values()) * schedule.tokens_per_row
    record = {
        "steps": log[-1]["step"],
        "planned_steps": schedule.steps,
        "tokens": log[-1]["step"] * batch,
        "seconds": log[-1]["seconds"],
        "schedule": vars(schedule),
        "rows_per_batch": ROWS,
        "training_tokens": {domain: len(stream) for domain, stream in tokens.streams.items()},
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "log": [entry for entry in log if entry["step"] % 100 == 0],
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, default=Path("/"), metavar="DIR", help="the unpacked packages [/]")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="log and state, to resume from")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, metavar="DIR", help="the checkpoint [beside this file]")
    parser.add_argument("--steps", type=int, default=Schedule.steps, help="optimizer steps [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch [%(default)s]")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        texts = documents(options.sources)
    except MissingSource as error:
        sys.exit(f"train: {error}")
    train(Schedule(steps=options.steps), texts, options.work, options.out)


if __name__ == "__main__":
    main()
