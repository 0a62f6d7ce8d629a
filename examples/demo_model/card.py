"""Writes the model card, and the expert shares as JSON, from what was measured and from the training's own record."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parent / "card_template.md"


def row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def share_table(domains: dict[str, Any], layer: int) -> str:
    """One layer's shares in per cent, with the skew of each domain."""
    shares = {domain: measured["shares"][layer] for domain, measured in domains.items()}
    number = len(next(iter(shares.values())))
    lines = [f"Layer {layer}", "", row(["domain", *range(number), "skew", "top"]), row(["---"] * (number + 3))]
    for domain, values in shares.items():
        cells = [f"{100 * value:.1f}" for value in values]
        lines.append(row([domain, *cells, skew(values), f"{max(values) * number:.1f}"]))
    return "\n".join([*lines, ""])


def skew(values: Sequence[float]) -> str:
    return f"{max(values) / min(values):.0f}x" if min(values) > 0 else "∞"


def curve(log: Sequence[dict[str, Any]]) -> str:
    """About ten entries of the training's log."""
    chosen = [*log[:: max(1, len(log) // 10)], log[-1]]
    steps = {entry["step"]: entry for entry in chosen}
    return "\n".join(
        row([f"{step:,}", f"{entry['loss']:.2f}", f"{entry['balance']:.3f}"]) for step, entry in steps.items()
    )


def describe(measured: dict[str, Any], record: dict[str, Any], size: int) -> str:
    """The whole card. `size` is the weights' file in bytes."""
    schedule, domains = record["schedule"], measured["domains"]
    perplexities = [
        row([domain, f"{m['tokens']:,}", m["perplexity"], m["unigram_perplexity"], m["bits_per_character"]])
        for domain, m in domains.items()
    ]
    code = [
        f"```text\n{prompt}\n# --- here the model goes on ---{text}\n```"
        for prompt, text in measured["code"]["continuations"]
    ]
    return TEMPLATE.read_text().format(
        **schedule | record,
        sums_of_each_kind=measured["sums_of_each_kind"],
        parameters=measured["parameters"],
        millions=measured["parameters"] / 1e6,
        megabytes=size / 1e6,
        long_tokens_per_row=2 * schedule["tokens_per_row"],
        batch=record["tokens"] // record["steps"],
        minutes=record["seconds"] / 60,
        rows=", ".join(f"{domain} {number}" for domain, number in record["rows_per_batch"].items()),
        curve=curve(record["log"]),
        perplexities="\n".join(perplexities),
        sums=", ".join(f"`{operator}` {share:.0%}" for operator, share in measured["sums"].items()),
        **measured["code"] | {"continuations": "\n\n".join(code)},
        chat="\n".join(row([asked, answer.replace("\n", " ")]) for asked, answer in measured["chat"]),
        shares="\n".join(share_table(domains, layer) for layer in range(len(domains["python"]["shares"]))),
    )


def write_card(checkpoint: Path, measured: dict[str, Any]) -> None:
    """README.md and expert_shares.json in the checkpoint's folder."""
    record = json.loads((checkpoint / "training.json").read_text())
    card = describe(measured, record, (checkpoint / "model.safetensors").stat().st_size)
    (checkpoint / "README.md").write_text(card)
    domains = measured["domains"]
    shares = {
        "unit": "fraction of the domain's (token, expert) rows in that layer; [layer][expert]",
        "shares": {domain: values["shares"] for domain, values in domains.items()},
        "perplexity": {domain: values["perplexity"] for domain, values in domains.items()},
        "unigram_perplexity": {domain: values["unigram_perplexity"] for domain, values in domains.items()},
    }
    text = json.dumps(shares)
    (checkpoint / "expert_shares.json").write_text(text.replace("]], ", "]],\n ").replace('": {', '": {\n ') + "\n")
