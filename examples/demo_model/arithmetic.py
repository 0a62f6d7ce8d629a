"""Sums in several notations. A sum's operands decide whether it is held out, so no held-out sum is ever trained on."""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = (
    "Ada",
    "Ben",
    "Chloe",
    "Dan",
    "Eve",
    "Finn",
    "Grace",
    "Hugo",
    "Iris",
    "Jack",
    "Kim",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
)
THINGS = ("apples", "books", "coins", "pens", "stones", "cards", "eggs", "shells", "stamps", "keys", "cups", "marbles")


@dataclass(frozen=True)
class Sum:
    """`left operator right = answer`, in whole numbers from 0 up."""

    left: int
    operator: str
    right: int
    answer: int

    @property
    def question(self) -> str:
        return f"{self.left} {self.operator} {self.right}"

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.question.encode()) % 20 == 0


def draw(random_source: random.Random, operator: str = "") -> Sum:
    """A random sum: up to three digits for + and -, up to two for * and for what / gives."""
    operator = operator or random_source.choice("+++--*/")
    size = 10 ** random_source.choice((1, 2, 2, 3))
    left, right = random_source.randrange(size), random_source.randrange(size)
    if operator == "+":
        return Sum(left, "+", right, left + right)
    if operator == "-":
        return Sum(max(left, right), "-", min(left, right), abs(left - right))
    left, right = random_source.randrange(1, 100), random_source.randrange(1, 13)
    if operator == "*":
        return Sum(left, "*", right, left * right)
    return Sum(left * right, "/", right, left)


def draw_from(random_source: random.Random, held_out: bool, operator: str = "") -> Sum:
    """A random sum of one split."""
    while (candidate := draw(random_source, operator)).held_out != held_out:
        pass
    return candidate


def plain(random_source: random.Random, held_out: bool) -> str:
    made = draw_from(random_source, held_out)
    return f"{made.question} = {made.answer}"


def compare(random_source: random.Random, held_out: bool) -> str:
    made = draw_from(random_source, held_out, "-")
    left, right = random_source.sample((made.left, made.right), 2)
    return f"{left} {'<' if left < right else '>' if left > right else '='} {right}"


def count(random_source: random.Random, held_out: bool) -> str:
    made = draw_from(random_source, held_out, "*")
    return ", ".join(str(made.left + step * made.right) for step in range(8))


def story(random_source: random.Random, held_out: bool) -> str:
    made = draw_from(random_source, held_out, random_source.choice("+-"))
    name, thing = random_source.choice(NAMES), random_source.choice(THINGS)
    verb = "finds" if made.operator == "+" else "loses"
    more = " more" if made.operator == "+" else ""
    return (
        f"{name} has {made.left} {thing} and {verb} {made.right}{more}. "
        f"Now {name} has {made.question} = {made.answer} {thing}."
    )


KINDS: tuple[Callable[[random.Random, bool], str], ...] = (plain, plain, plain, compare, count, story)


def arithmetic_documents(number: int = 16_000, lines: int = 12) -> Iterator[tuple[str, str]]:
    """(name, text) of `number` pages of exercises, each of one kind or of several; a page's name decides its split."""
    for page in range(number):
        name = f"arithmetic/{page}"
        held_out = zlib.crc32(name.encode()) % 20 == 0
        random_source = random.Random(page)
        kind = random_source.choice(KINDS)
        mixed = random_source.random() < 0.3
        kinds = [random_source.choice(KINDS) if mixed else kind for _ in range(lines)]
        yield name, "\n".join(make(random_source, held_out) for make in kinds)
