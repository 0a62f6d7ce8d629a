"""The text of prompts: of a domain, of a wanted length, the same for the same seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from expertmesh.errors import ConfigError
from loadtest.config import Workload
from loadtest.target import Request
from loadtest.trace import MOONCAKE_BLOCK

CHARACTERS_PER_TOKEN = 4
MADE_UP = "words"
"""The domain of made-up words, where no prompts are given."""
SYLLABLES = "ka lo mi ne ru sa te vo pi du bel tor fan gri sol men".split()  # noqa: SIM905


class Measure(Protocol):
    """What counts as a token."""

    def ends(self, text: str) -> list[int]:
        """Where each token of the text ends, ascending, in characters."""
        ...


class Characters:
    def ends(self, text: str) -> list[int]:
        return [*range(CHARACTERS_PER_TOKEN, len(text), CHARACTERS_PER_TOKEN), len(text)]


class Tokens:
    """As a model's tokenizer counts; where texts are cut and joined it may come out differently by one or two."""

    def __init__(self, path: Path) -> None:
        """`path`: tokenizer.json, or a folder with it; raises ConfigError where that is none."""
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: {(getattr(error, 'strerror', None) or 'not text in UTF-8').lower()}") from None
        # tokenizers raises a bare Exception for any content that it does not know
        try:
            self._tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # noqa: BLE001
            raise ConfigError(f"{file}: no tokenizer: {str(error).splitlines()[0]}") from None

    def ends(self, text: str) -> list[int]:
        return [end for _start, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    ends: list[int]

    def part(self, first: int, tokens: int) -> tuple[str, int]:
        """Up to `tokens` tokens from the one numbered `first` on, and how many they are."""
        last = min(len(self.ends), first + tokens)
        return self.text[self.ends[first - 1] if first else 0 : self.ends[last - 1]], last - first


class Texts:
    """All the text that a workload may send."""

    def __init__(self, workload: Workload, seed: int) -> None:
        """Raises ConfigError where prompts or tokenizer cannot be read, or a mix names a domain that has no prompts."""
        self._seed = seed
        self._measure: Measure = Characters() if workload.tokenizer is None else Tokens(workload.tokenizer)
        found = {} if workload.prompts is None else read_prompts(workload.prompts)
        self._pools = {domain: [self._piece(text) for text in texts] for domain, texts in found.items()}
        self.domains = tuple(self._pools) or (MADE_UP,)
        for mix in workload.domains:
            if unknown := set(mix.weights) - set(self.domains):
                known = ", ".join(self.domains)
                raise ConfigError(f"workload.domains: no prompts of domain {min(unknown)!r} (there are: {known})")
        self._known: dict[tuple[str, int, str, int], str] = {}

    def prompt(self, request: Request) -> str:
        """What the request adds to its conversation: shared prefix, trace blocks, and text of its own."""
        own = random.Random(f"{request.seed}/{request.turn}")
        parts = []
        if request.turn == 0 and request.prefix is not None:
            parts.append(self._shared("prefix", request.prefix, request.domain, request.prefix_tokens))
        tokens = request.prompt_tokens
        for block in request.blocks:
            if tokens <= 0:
                break
            length = min(tokens, MOONCAKE_BLOCK)
            parts.append(self._shared("block", block, request.domain, length))
            tokens -= length
        if tokens > 0:
            parts.append(self._text(own, request.domain, tokens))
        return "".join(parts)

    def _shared(self, kind: str, number: int, domain: str, tokens: int) -> str:
        key = (kind, number, domain if kind == "prefix" else "", tokens)
        if key not in self._known:
            generator = random.Random(f"{self._seed}/{kind}/{number}")
            self._known[key] = self._text(generator, domain, tokens)
        return self._known[key]

    def _text(self, generator: random.Random, domain: str, tokens: int) -> str:
        """A text of `tokens` tokens: texts of the domain one after another, the first from somewhere inside it, since
        the same few prompts would only meet the prefix cache."""
        pool = self._pools.get(domain)
        parts: list[str] = []
        while tokens > 0:
            piece = self._piece(made_up_words(generator, tokens)) if pool is None else generator.choice(pool)
            first = 0 if parts or pool is None else generator.randrange(len(piece.ends) // 2 + 1)
            kept, count = piece.part(first, tokens)
            parts.append(" " + kept if parts and parts[-1][-1:].isalnum() else kept)
            tokens -= count
        return "".join(parts)

    def _piece(self, text: str) -> Piece:
        return Piece(text, self._measure.ends(text))


def made_up_words(generator: random.Random, tokens: int) -> str:
    """Words of two syllables, about a token of 4 characters each with the blank."""
    return " ".join("".join(generator.choices(SYLLABLES, k=2)) for _ in range(tokens))


def read_prompts(path: Path) -> dict[str, list[str]]:
    """{"domain": ["text", ...]}; raises ConfigError naming what is wrong."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except ValueError:
        raise ConfigError(f"{path}: not JSON in UTF-8") from None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f'{path}: not an object {{"domain": ["text", ...]}}')
    for domain, texts in found.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise ConfigError(f"{path}: {domain}: not a list of texts")
    return found
