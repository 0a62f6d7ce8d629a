"""The common cases of a run as flags, over a file or without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from expertmesh.errors import ConfigError
from expertmesh.yaml_file import first_problem
from loadtest.config import KINDS, RunConfig, load_run

DEFAULT_DURATION_S = 30.0
OBJECTIVES = {"ttft": "ttft_ms", "tpot": "tpot_ms", "e2e": "e2e_ms", "share": "share"}


@dataclass(frozen=True)
class Flags:
    """None: as the file has it."""

    url: str | None = None
    cluster: str | None = None
    model: str | None = None
    chat: bool = False
    rate: float | None = None
    users: int | None = None
    duration_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    slo: Sequence[str] = ()
    seed: int | None = None
    repeats: int | None = None
    processes: int | None = None


def make_config(file: Path | None, flags: Flags) -> RunConfig:
    """Raises ConfigError in one line, naming the file or the flag."""
    if file is not None:
        content = load_run(file).model_dump(exclude_unset=True)
    else:
        content = {"target": {"kind": "openai", "cluster": "auto"}, "stages": []}
        if flags.rate is None and flags.users is None:
            raise ConfigError("without a RUN file, give --rate or --users")
    _set_target(content, flags)
    _set_stages(content, flags)
    workload = {"prompt_tokens": flags.prompt_tokens, "output_tokens": flags.output_tokens}
    for key, tokens in workload.items():
        if tokens is not None:
            content.setdefault("workload", {})[key] = {"kind": "fixed", "value": tokens}
    if flags.slo:
        content["objectives"] = content.get("objectives", {}) | dict(map(parse_objective, flags.slo))
    top = {"seed": flags.seed, "repeats": flags.repeats}
    content |= {key: value for key, value in top.items() if value is not None}
    if flags.processes is not None:
        content["client"] = content.get("client", {}) | {"processes": flags.processes}
    try:
        return RunConfig.model_validate(content)
    except pydantic.ValidationError as error:
        raise ConfigError(f"flags: {first_problem(error, KINDS)}") from None


def parse_objective(text: str) -> tuple[str, float]:
    """`ttft:500` -> ("ttft_ms", 500.0); raises ConfigError."""
    name, _, value = text.partition(":")
    try:
        return OBJECTIVES[name], float(value)
    except (KeyError, ValueError):
        raise ConfigError(f"--slo {text}: not NAME:NUMBER with ttft, tpot, e2e (ms) or share (0 to 1)") from None


def _set_target(content: dict[str, Any], flags: Flags) -> None:
    target = content["target"]
    if flags.url is not None or flags.cluster is not None:
        for key in ("url", "cluster", "directory"):
            target.pop(key, None)
        target |= {key: value for key, value in (("url", flags.url), ("cluster", flags.cluster)) if value is not None}
    if flags.model is not None:
        target["model"] = flags.model
    if flags.chat:
        target["api"] = "chat"


def _set_stages(content: dict[str, Any], flags: Flags) -> None:
    if flags.rate is not None and flags.users is not None:
        raise ConfigError("--rate and --users: give one of them")
    stages = content["stages"]
    if flags.rate is not None or flags.users is not None:
        poisson, closed = {"kind": "poisson", "rate": flags.rate}, {"kind": "closed", "users": flags.users}
        arrivals = poisson if flags.users is None else closed
        stages = [{"name": "main", "duration_s": DEFAULT_DURATION_S, "arrivals": arrivals}]
    if flags.duration_s is not None:
        if len(stages) != 1:
            raise ConfigError(f"--duration: the file has {len(stages)} stages; give --rate or --users too")
        stages = [dict(stages[0]) | {"duration_s": flags.duration_s}]
    content["stages"] = stages
