"""What can be fuzzed, by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from fuzz.answer import answers
from fuzz.directory import directory
from fuzz.request import requests
from fuzz.run import Target

TARGETS: dict[str, Callable[[Path], AbstractContextManager[Target]]] = {
    "request": requests,
    "answer": answers,
    "directory": directory,
}
"""Each makes its target with a folder for what it needs."""
