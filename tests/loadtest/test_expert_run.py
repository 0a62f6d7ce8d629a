"""`expertmesh loadtest` on a real expert tier, from the run's file to the page, and `compare` on what it wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from mesh import running_directory, running_groups
from session_cluster import ROOT, expertmesh
from test_expert_tier import wait_for_replicas

from loadtest.config import load_run

ENVIRONMENT = dict(os.environ)


def write_run(folder: Path, directory: str, **load: Any) -> Path:
    path = folder / "run.yaml"
    run = {
        "name": "tier",
        "target": {"kind": "experts", "directory": directory},
        "expert_load": {"skew": {"kind": "hot_set", "hot_experts": 2, "hot_share": 0.5}, **load},
        "stages": [{"name": "steady", "duration_s": 2, "arrivals": {"kind": "poisson", "rate": 30}}],
        "sampling": {"every_s": 0.2},
        # a machine that also runs the rest of the tests may be busy
        "client": {"max_lateness_ms": 10_000},
    }
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.fixture(scope="module")
def results(demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`light` and `heavy`: the same arrivals with 1 and with 512 rows each."""
    folder = tmp_path_factory.mktemp("tier")
    with running_directory() as directory, running_groups(demo_artifact, directory, 2):
        wait_for_replicas(directory, 2)
        for name, rows in (("light", 1), ("heavy", 512)):
            run = write_run(folder, directory, rows={"kind": "fixed", "value": rows})
            done = expertmesh("loadtest", str(run), "--out", str(folder / name), environment=ENVIRONMENT)
            assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_a_run_tells_what_the_tier_did(results: Path) -> None:
    found = json.loads((results / "heavy" / "summary.json").read_text())
    assert found["requests"]["by_status"] == {"ok": found["requests"]["scheduled"]}
    assert found["figures"]["e2e_ms.p50"]["value"] > 0 and "ttft_ms.p50" not in found["figures"]
    rows = 512 * found["requests"]["scheduled"]
    assert sum(layer["rows"] for layer in found["experts"].values()) == 2 * rows
    assert {layer["hottest"] for layer in found["experts"].values()} <= {0, 1}
    assert all(layer["hottest_share"] == pytest.approx(0.25, abs=0.02) for layer in found["experts"].values())
    assert found["groups"].keys() == {"g0", "g1"} and found["groups"]["g0"]["replicas_max"] == 1
    assert {"experts.png", "rows.png"} <= {path.name for path in (results / "heavy" / "plots").iterdir()}


def test_compare_tells_a_regression_by_its_exit_code(results: Path) -> None:
    light, heavy = str(results / "light"), str(results / "heavy")
    worse = expertmesh("loadtest", "compare", light, heavy, "--threshold", "e2e_ms.p75=20", environment=ENVIRONMENT)
    assert worse.returncode == 5, worse.stderr
    verdict = worse.stdout.splitlines()[-1]
    assert verdict.startswith("regressed: ") and {"e2e_ms.p50", "e2e_ms.p75"} <= set(verdict.replace(",", "").split())
    assert "expert_load.rows.value: 1, 512" in worse.stdout and "no confidence" in worse.stdout
    same = expertmesh("loadtest", "compare", light, light, "--json", environment=ENVIRONMENT)
    assert same.returncode == 0 and json.loads(same.stdout)["regressed"] is False
    wrong = expertmesh("loadtest", "compare", light, str(results), environment=ENVIRONMENT)
    assert wrong.returncode == 1
    assert wrong.stderr == f"expertmesh: {results / 'summary.json'}: no such file or directory\n"


@pytest.mark.parametrize("example", sorted((ROOT / "examples" / "loadtest").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_valid(example: Path) -> None:
    config = load_run(example)
    assert config.name == example.stem
    for path in (config.text.prompts, config.text.tokenizer) if config.target.kind == "openai" else ():
        assert path is None or path.exists()
