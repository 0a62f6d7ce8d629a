"""Conversations made of the other domains' text, in the format that the chat template gives."""

import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from examples.demo_model.arithmetic import draw_from

END = "<|endoftext|>"
ROLES = ("system", "user", "assistant")
TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}" + END + "\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ASK_SUM = ("What is {}?", "Compute {}.", "{} = ?", "How much is {}?", "Please work out {}.")
ASK_CODE = ("Continue this Python code:", "Complete this Python function:", "Finish this code:")
ASK_STORY = ("Continue this story:", "Continue this text:", "What comes next?")
ASK_RECORD = ("Show {} as JSON.", "Give me the record of {}.", "Which codes has {}?")
SMALL_TALK = (
    ("Hello", "Hello! I am a small demo model. Ask me for a sum, or give me some text or code to continue."),
    ("Hi", "Hello! I am a small demo model. Ask me for a sum, or give me some text or code to continue."),
    ("Who are you?", "I am the demo model of expertmesh: a small mixture of experts."),
    ("What can you do?", "I continue Python code, English prose and tables of data, and I work out small sums."),
    ("Thank you", "You are welcome."),
)


class Text(Protocol):
    """What this module needs of a document."""

    @property
    def domain(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def text(self) -> str: ...


def render(turns: Sequence[tuple[str, str]]) -> str:
    """`turns` of (role, content) as the template renders them, less the last end and newline, which packing adds."""
    return (END + "\n").join(f"<|{role}|>\n{content}" for role, content in turns)


def sum_turns(random_source: random.Random, held_out: bool) -> list[tuple[str, str]]:
    turns = []
    for _ in range(random_source.choice((1, 1, 2, 3))):
        made = draw_from(random_source, held_out)
        turns.append(("user", random_source.choice(ASK_SUM).format(made.question)))
        turns.append(("assistant", f"{made.question} = {made.answer}"))
    return turns


def talk_turns(random_source: random.Random, held_out: bool) -> list[tuple[str, str]]:
    question, answer = random_source.choice(SMALL_TALK)
    return [("user", question), ("assistant", answer)]


def code_turns(random_source: random.Random, text: str) -> list[tuple[str, str]]:
    """A function's first lines and the lines after them; none where the text defines no function."""
    starts = [match.start() for match in re.finditer(r"^(def|class) ", text, re.MULTILINE)]
    if not starts:
        return []
    lines = text[random_source.choice(starts) :].splitlines()
    cut = random_source.randint(2, 8)
    question = random_source.choice(ASK_CODE) + "\n\n" + "\n".join(lines[:cut])
    return [("user", question), ("assistant", "\n".join(lines[cut : cut + 16]))]


def story_turns(random_source: random.Random, text: str) -> list[tuple[str, str]]:
    sentences = re.split(r"(?<=[.!?:;]) ", " ".join(text.split()))
    cut = random_source.randrange(max(1, len(sentences) - 6))
    asked, told = " ".join(sentences[cut : cut + 2]), " ".join(sentences[cut + 2 : cut + 6])
    return [("user", f"{random_source.choice(ASK_STORY)}\n\n{asked}"), ("assistant", told)]


def record_documents(root: Path) -> Iterator[tuple[str, str]]:
    (countries,) = json.loads((root / "usr/share/iso-codes/json/iso_3166-1.json").read_text("utf-8")).values()
    for country in countries:
        for ask in ASK_RECORD:
            record = json.dumps(
                {key: country[key] for key in ("name", "alpha_2", "alpha_3", "numeric")}, ensure_ascii=False
            )
            yield f"chat/{country['alpha_3']}", render([("user", ask.format(country["name"])), ("assistant", record)])


def chat_documents(texts: Sequence[Text], root: Path, number: int = 8_000) -> Iterator[tuple[str, str]]:
    """(name, text) of conversations; those made of another document bear its name, and so fall into its split."""
    makers: dict[str, tuple[int, Callable[[random.Random, str], list[tuple[str, str]]]]] = {
        "python": (4, code_turns),
        "prose": (2, story_turns),
    }
    for position, text in enumerate(texts):
        repeats, make = makers.get(text.domain, (0, story_turns))
        random_source = random.Random(position)
        for _ in range(repeats + len(text.text) // 20_000 if repeats else 0):
            if turns := make(random_source, text.text):
                yield text.name, render(turns)
    for position in range(number):
        name = f"chat/{position}"
        random_source = random.Random(position)
        talk = talk_turns if position % 16 == 0 else sum_turns
        yield name, render(talk(random_source, zlib.crc32(name.encode()) % 20 == 0))
    yield from record_documents(root)
