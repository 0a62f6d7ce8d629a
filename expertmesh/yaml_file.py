"""A YAML file as a validated object, or one line that says where it is wrong."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from expertmesh.errors import ConfigError

MAX_CONFIG_BYTES = 2**20
TYPE_NAMES = frozenset({"str", "dict[str,str]"})
"""Of unions, which pydantic puts into an error's location."""
Model = TypeVar("Model", bound=pydantic.BaseModel)


def read_model(path: Path, model: type[Model], begins: str, hidden: Set[str] = TYPE_NAMES) -> Model:
    """Raises ConfigError with one line: the file, the key and what is wrong with it.

    `begins` says how such a file begins, for one that has no keys; parts of a location in `hidden` are not shown.
    """
    content = parse_mapping(_read(path), path, begins)
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error, hidden)}") from None


def parse_mapping(text: str, path: Path, begins: str) -> dict[str, Any]:
    """The file's content; raises ConfigError with one line, as `read_model` does."""
    try:
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    if content is None:
        raise ConfigError(f"{path}: is empty")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no keys; {begins}")
    return content


def first_problem(error: pydantic.ValidationError, hidden: Set[str] = TYPE_NAMES) -> str:
    """`groups.0.num_gpus: unknown key`: where and what, of the first of the errors."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if part not in hidden)
    if first["type"] == "extra_forbidden":
        what = "unknown key"
    elif first["type"] == "missing":
        what = "is missing"
    else:
        what = first["msg"].removeprefix("Value error, ")
    return f"{key}: {what}" if key else what


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB; not a config")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not text in UTF-8") from None
