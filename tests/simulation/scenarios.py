"""Small scenarios: minutes of a small model on fast modelled devices."""

from __future__ import annotations

import copy
from typing import Any

from expertmesh.simulation.scenario import Scenario

SMALL: dict[str, Any] = {
    "seed": 3,
    "duration_s": 1800,
    "model": {"layers": 4, "experts": 32, "top_k": 4, "hidden_size": 2048, "intermediate_size": 1408},
    "device": {"teraflops": 120, "memory_gb_per_s": 600},
    "division": {"layers_per_group": 4, "experts_per_group": 2, "max_replicas": 64},
    "traffic": {
        "peak_tokens_per_s": 1e7,
        "peak_at_h": 0,
        "tokens_per_step": 8192,
        "popularity": {"exponent": 1.0, "switch_every_s": 600, "switch_share": 0.5, "fade_s": 120},
    },
}


def scenario(**changes: Any) -> Scenario:
    """SMALL with sections replaced; `traffic__noise=0.1` changes one key of a section, two deep where there are two."""
    described = copy.deepcopy(SMALL)
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = described
        for section in sections:
            place = place.setdefault(section, {})
        if value is None:
            place.pop(key, None)
        else:
            place[key] = value
    return Scenario.model_validate(described)
