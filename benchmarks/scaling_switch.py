"""How the groups of `hot_experts` scale at the moment: a file says it to `switched_policy`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

wanted: dict[str, int] = {}
"""Group -> replicas that its own load asks for; in Ray Serve's controller, of all groups that scale together."""


class Switch(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    scaling: Literal["held", "per_group", "uniform"]
    replicas: dict[str, int] = {}
    """Of each group, while they are held."""

    @classmethod
    def read(cls, path: Path) -> Switch:
        return cls.model_validate_json(path.read_text())

    def write(self, path: Path) -> None:
        new = path.with_suffix(".new")
        new.write_text(self.model_dump_json())
        new.replace(path)
