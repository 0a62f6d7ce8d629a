"""Lengths drawn from a distribution."""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path

from expertmesh.errors import ConfigError
from loadtest.config import FileLength, FixedLength, Length, LognormalLength, UniformLength


def draw(length: Length, generator: random.Random) -> int:
    """One length, 1 or more."""
    if isinstance(length, FixedLength):
        return length.value
    if isinstance(length, UniformLength):
        return generator.randint(length.low, length.high)
    if isinstance(length, LognormalLength):
        found = round(math.exp(generator.gauss(math.log(length.median), length.sigma)))
        return min(max(found, length.low), length.high)
    return generator.choice(lengths_in(length.path))


def check(length: Length) -> None:
    """Raises ConfigError where the file of a distribution cannot be drawn from."""
    if isinstance(length, FileLength):
        lengths_in(length.path)


@functools.cache
def lengths_in(path: Path) -> tuple[int, ...]:
    """Raises ConfigError naming file and line of what is no length."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not text in UTF-8") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip().isdecimal() or int(line) < 1:
            raise ConfigError(f"{path}:{number}: {line.strip()[:40]!r} is no whole number from 1 on")
        found.append(int(line))
    if not found:
        raise ConfigError(f"{path}: is empty")
    return tuple(found)
