"""Short held-out prompts of every domain, for load generators, the demo and the tests."""

import random
import re
from collections.abc import Sequence
from typing import Any

from examples.demo_model.chat import END
from examples.demo_model.corpus import DOMAINS, Document

PROMPTS_PER_DOMAIN = 24
SHORTEST, LONGEST = 20, 110


def starts(document: Document) -> list[int]:
    """Where a prompt may begin: functions and classes of code, paragraphs of prose, elsewhere the text's own start."""
    patterns = {"python": r"^(?=def |class )", "prose": r"(?:(?<=\n\n)|\A)(?=\S)"}
    pattern = patterns.get(document.domain, r"\A")
    return [match.start() for match in re.finditer(pattern, document.text, re.MULTILINE)]


def cut(document: Document, source: random.Random, tokenizer: Any) -> str:
    """One prompt of SHORTEST to LONGEST tokens, or a user's first message; empty where the document has none."""
    if document.domain == "chat":
        text = document.text.removeprefix("<|user|>\n").split(END)[0]
        return text if len(tokenizer(text)["input_ids"]) <= LONGEST else ""
    places = starts(document)
    if not places:
        return ""
    begin = source.choice(places)
    text = document.text[begin : begin + 1000]
    wanted = source.randint(SHORTEST * 3 // 2, LONGEST)
    ends = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][:wanted]
    prompt = text[: ends[-1][1]]
    if document.domain != "prose":
        prompt = prompt[: prompt.rfind("\n") + 1]
    prompt = prompt.rstrip()
    return prompt if len(tokenizer(prompt)["input_ids"]) >= SHORTEST else ""


def held_out_prompts(texts: Sequence[Document], tokenizer: Any, number: int) -> dict[str, list[str]]:
    """`number` different prompts per domain; none from iso-codes, whose licence (LGPL) is not that of the rest."""
    prompts: dict[str, list[str]] = {}
    for domain in DOMAINS:
        source = random.Random(domain)
        chosen = [
            text for text in texts if text.domain == domain and text.held_out and not text.name.startswith("iso_")
        ]
        found: dict[str, None] = {}
        while len(found) < number:
            if prompt := cut(source.choice(chosen), source, tokenizer):
                found[prompt] = None
        prompts[domain] = list(found)
    return prompts
