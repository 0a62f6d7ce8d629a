"""Every run that cannot be made is refused with one line that names the file, the key and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stub import ROOT

from expertmesh.errors import ConfigError
from loadtest.config import RunConfig, load_run
from loadtest.flags import Flags, make_config
from loadtest.schedule import Schedule

TARGET = "target: {kind: openai, url: http://127.0.0.1:1/v1}\n"
STAGES = "stages: [{name: main, duration_s: 5, arrivals: {kind: poisson, rate: 3}}]\n"


def stage(arrivals: str) -> str:
    return TARGET + f"stages: [{{name: main, duration_s: 5, arrivals: {{{arrivals}}}}}]\n"


def workload(text: str) -> str:
    return TARGET + STAGES + f"workload: {{{text}}}\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("- a", "holds no keys; a run begins with"),
        (TARGET + STAGES + "sped: 3", "sped: unknown key"),
        (TARGET, "stages: is missing"),
        (TARGET + "stages: []", "stages: Tuple should have at least 1 item"),
        (stage("kind: poisson, rate: 0"), "stages.0.arrivals.rate: Input should be greater than 0"),
        (stage("kind: poisson, rate: .nan"), "stages.0.arrivals.rate: Input should be"),
        (stage("kind: poisson, rate: .inf"), "stages.0.arrivals.rate: Input should be"),
        (stage("kind: poisson, rate: 1, burst: 2"), "stages.0.arrivals.burst: unknown key"),
        (stage("kind: gamma, rate: 1"), "stages.0.arrivals.burstiness: is missing"),
        (stage("kind: weibull, rate: 1"), "stages.0.arrivals: Input tag 'weibull'"),
        (stage("kind: poisson, rate: 1, wave: {amplitude: 2, period_s: 9}"), "amplitude: Input should be less than"),
        (stage("kind: closed, users: 0"), "stages.0.arrivals.users: Input should be greater than or equal to 1"),
        (TARGET + STAGES.replace("duration_s: 5, ", ""), "stages.0: duration_s: is missing"),
        (TARGET + STAGES.replace("main", "m n"), "stages.0.name: String should match"),
        (TARGET + STAGES.replace("duration_s", "measured: false, duration_s"), "stages: none is measured"),
        (workload("prompt_tokens: {kind: uniform, low: 9, high: 3}"), "workload.prompt_tokens: high 3 < low 9"),
        (workload("prompt_tokens: {kind: fixed, value: 0}"), "workload.prompt_tokens.value: Input should be"),
        (
            workload("output_tokens: {kind: lognormal, median: 5, sigma: 1, low: 9}"),
            "workload.output_tokens: median 5 is not between low 9 and high 1000000",
        ),
        (workload("output_tokens: {kind: lognormal, median: 5, sigma: -1}"), "sigma: Input should be greater"),
        (workload("domains: [{weights: {a: 0}}]"), "workload.domains.0: weights: all are 0"),
        (workload("domains: [{weights: {a: 1}}, {weights: {a: 2}}]"), "workload: domains: at_s must ascend"),
        (workload("domains: [{at_s: 3, weights: {a: 1}}]"), "workload: domains: the first at_s must be 0"),
        (workload("cancel: {share: 1.5}"), "workload.cancel.share: Input should be less than or equal to 1"),
        (STAGES + "target: {kind: openai}", "target: give either url or cluster"),
        (STAGES + "target: {kind: openai, url: a/v1}", "target: url: 'a/v1' does not begin with http"),
        (STAGES + "target: {kind: experts, directory: 'a:1'}\nworkload: {}", "workload: does not go with"),
        (TARGET + STAGES + "expert_load: {}", "expert_load: does not go with a target of kind openai"),
        (TARGET + STAGES + "faults: [{at_s: 1, kind: kill, group: a}]", "faults: only a cluster of one's own"),
        (TARGET + STAGES + "faults: [{at_s: 1, kind: hang, group: a}]", "faults.0: hang: for_s: is missing"),
        (TARGET + STAGES + "faults: [{at_s: 1, kind: kill}]", "faults.0: kill: group: is missing"),
        (TARGET + STAGES + "faults: [{at_s: 1, kind: corrupt, group: a}]", "faults.0: corrupt: for_s: is missing"),
        (
            TARGET + STAGES + "faults: [{at_s: 1, kind: corrupt, group: a, for_s: 1, what: id}]",
            "faults.0.what: Input should be 'rows', 'dtype', 'nan' or 'checksum'",
        ),
        (TARGET + STAGES + "objectives: {ttft_ms: -3}", "objectives.ttft_ms: Input should be greater than 0"),
        (TARGET + STAGES + "a: b: c", "not YAML"),
    ],
)
def test_a_wrong_file(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as raised:
        load_run(path)
    assert str(raised.value).startswith(str(path))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_paths_start_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(workload("prompt_tokens: {kind: file, path: lengths.txt}, prompts: ../p.json"))
    config = load_run(path)
    assert config.text.prompts == (tmp_path / "../p.json").resolve()
    assert config.model_dump(mode="json")["workload"]["prompt_tokens"]["path"] == str(tmp_path / "lengths.txt")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("3\nx\n", ":2: 'x' is no whole number from 1 on"),
        ("0\n", ":1: '0' is no whole number from 1 on"),
        ("", ": is empty"),
    ],
)
def test_a_file_of_lengths_that_cannot_be_drawn_from(tmp_path: Path, lines: str, said: str) -> None:
    (tmp_path / "lengths.txt").write_text(lines)
    (tmp_path / "run.yaml").write_text(workload("prompt_tokens: {kind: file, path: lengths.txt}"))
    config = load_run(tmp_path / "run.yaml")
    with pytest.raises(ConfigError) as raised:
        Schedule(config, 0, ("words",))
    assert str(raised.value) == f"{tmp_path / 'lengths.txt'}{said}"


def test_flags_alone_make_a_run() -> None:
    flags = Flags(url="http://h/v1", rate=5, duration_s=3, slo=("ttft:500", "share:0.9"), prompt_tokens=7, seed=4)
    config = make_config(None, flags)
    assert config.stages[0].model_dump(include={"name", "duration_s"}) == {"name": "main", "duration_s": 3}
    assert config.objectives.given == {"ttft": 500} and config.objectives.share == 0.9
    assert config.text.prompt_tokens.model_dump() == {"kind": "fixed", "value": 7}
    assert config.seed == 4


def test_flags_change_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(TARGET + STAGES + "objectives: {tpot_ms: 5}\nclient: {drain_s: 9}\n")
    config = make_config(path, Flags(cluster="demo", users=3, processes=2, slo=("ttft:8",)))
    assert config.target.cluster == "demo"
    assert config.stages[0].arrivals.model_dump() == {"kind": "closed", "users": 3, "think_s": 0}
    assert config.objectives.given == {"tpot": 5, "ttft": 8}
    assert config.client.processes == 2 and config.client.drain_s == 9


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (Flags(), "without a RUN file, give --rate or --users"),
        (Flags(rate=1, users=1), "--rate and --users: give one of them"),
        (Flags(rate=-1), "flags: stages.0.arrivals.rate: Input should be greater than 0"),
        (Flags(rate=1, slo=("ttft=5",)), "--slo ttft=5: not NAME:NUMBER"),
        (Flags(rate=1, slo=("p99:5",)), "--slo p99:5: not NAME:NUMBER"),
        (Flags(rate=1, url="ftp://x"), "flags: target: url: 'ftp://x' does not begin with http"),
    ],
)
def test_wrong_flags(flags: Flags, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_config(None, flags)
    assert str(raised.value).startswith(said)


def test_the_published_schema_is_the_code_s() -> None:
    published = json.loads((ROOT / "docs" / "loadtest.schema.json").read_text())
    assert published == json.loads(json.dumps(RunConfig.model_json_schema()))
