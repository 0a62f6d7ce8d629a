"""Loads from files and from the directory; what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from placement_values import loads_of, manifest, zipf

from expertmesh.errors import ClusterError, ConfigError
from expertmesh.placement.loads import (
    check_loads,
    loads_text,
    observed_loads,
    pair_matrix,
    read_loads_file,
    uniform_loads,
)
from expertmesh.v1 import directory_pb2 as pb

MODEL = manifest({0: 4, 2: 4})
RATES = {0: [1.0, 2.0, 3.0, 4.0], 2: [0.0, 0.0, 0.0, 1.0]}


def refused(folder: Path, text: str) -> str:
    path = folder / "loads"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        check_loads(read_loads_file(path), MODEL, str(path))
    line = str(error.value)
    assert line.startswith(f"{path}:") and "\n" not in line
    return line.removeprefix(str(path))


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    as_json, as_yaml = tmp_path / "a", tmp_path / "b"
    as_json.write_text(json.dumps({"rows_per_s": RATES, "coactivation": {"0": [[0, 1, 0.5]]}}))
    as_yaml.write_text("rows_per_s: {0: [1, 2, 3, 4], 2: [0, 0, 0, 1]}\ncoactivation: {0: [[0, 1, 0.5]]}\n")
    found = read_loads_file(as_json)
    assert found == read_loads_file(as_yaml)
    check_loads(found, MODEL, "loads")
    assert found.array(MODEL).tolist() == [RATES[0], RATES[2]]
    pairs = pair_matrix(found.coactivation, 0, 4)
    assert pairs is not None and pairs[0, 1] == pairs[1, 0] == 0.5 and pairs.sum() == 1
    assert pair_matrix(found.coactivation, 2, 4) is None


def test_a_flow_mapping_of_yaml(tmp_path: Path) -> None:
    path = tmp_path / "loads.yaml"
    path.write_text("{rows_per_s: {0: [1], 1: [2]}}")
    assert read_loads_file(path).rows_per_s == {0: (1.0,), 1: (2.0,)}


def test_a_large_model_fits_and_comes_back(tmp_path: Path) -> None:
    array = zipf(61, 256, 1.0)
    pairs = {layer: [[one, (one + 7) % 256, 0.01] for one in range(256)] for layer in range(61)}
    path = tmp_path / "loads.json"
    path.write_text(loads_text(loads_of(array, coactivation=pairs)))
    found = read_loads_file(path)
    model = manifest(dict.fromkeys(range(61), 256))
    check_loads(found, model, "loads")
    assert numpy.array_equal(found.array(model), array)


def test_layers_of_different_sizes() -> None:
    model = manifest({0: 2, 1: 3})
    array = uniform_loads(model, 3.0).array(model)
    assert array[0, :2].tolist() == [3.0, 3.0] and numpy.isnan(array[0, 2]) and array[1].tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"rows_per_s": {0: RATES[0]}}, ": rows_per_s: layer 2 is missing"),
        ({"rows_per_s": RATES | {5: [1]}}, ": layer 5 has no routed experts in this model"),
        ({"rows_per_s": RATES | {2: [1, 2]}}, ": rows_per_s.2: 2 experts, this model has 4"),
        ({"rows_per_s": RATES, "fingerprint": "e" * 64}, ": loads of the model with fingerprint eeeeeeeeeeee, this"),
        ({"rows_per_s": {0: [0] * 4, 2: [0] * 4}}, ": no expert has any load"),
        (
            {"rows_per_s": RATES, "coactivation": {0: [[0, 4, 0.1]]}},
            ": coactivation.0: this model has experts 0-3, not",
        ),
        ({"rows_per_s": RATES, "coactivation": {0: [[1, 1, 0.1]]}}, ": coactivation.0: expert 1 stands beside itself"),
        ({"rows_per_s": RATES, "coactivation": {0: [[0, 1, 1.5]]}}, ": coactivation.0.0.2: Input should be less"),
        ({"rows_per_s": RATES | {0: [1, 2, 3, -4]}}, ": rows_per_s.0.3: Input should be greater than or equal to 0"),
        ({"rows_per_s": RATES | {0: [1, 2, 3, float("nan")]}}, ": rows_per_s.0.3: Input should be"),
        ({"rows_per_s": RATES | {0: [1, 2, 3, float("inf")]}}, ": rows_per_s.0.3: Input should be a finite number"),
        ({"rows_per_s": {}}, ": rows_per_s: Dictionary should have at least 1 item"),
        ({"rows_per_s": RATES, "extra": 1}, ": extra: unknown key"),
        ({}, ": rows_per_s: is missing"),
        ([], ": holds no keys; loads begin with `rows_per_s:`"),
    ],
)
def test_loads_that_will_not_do(tmp_path: Path, content: object, said: str) -> None:
    assert refused(tmp_path, json.dumps(content)).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": holds no keys"),
        ("a: [", ":1:"),
        ("{\x01", ": neither JSON nor YAML"),
        ("[" * 100000, ": nested too deeply"),
        ("{" * 10, ": neither JSON nor YAML"),
        ('{"a":' * 100000, ": nested too deeply"),
        ("a: &a [1]\nb: *a", "aliases do not"),
    ],
)
def test_files_that_are_no_loads(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent: no such file or directory"):
        read_loads_file(tmp_path / "absent")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match="bytes: "):
        read_loads_file(tmp_path / "bytes")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(ConfigError, match="large: larger than 64 MiB; not loads"):
        read_loads_file(tmp_path / "large")


def test_observed_loads() -> None:
    layers = [pb.LayerRows(layer=0, experts=[1, 3], rows=[10, 30]), pb.LayerRows(layer=2, experts=[0], rows=[5])]
    found = observed_loads(pb.ExpertLoadReply(fingerprint="f" * 64, window_s=10, layers=layers), MODEL)
    assert found.rows_per_s == {0: (0, 1, 0, 3), 2: (0.5, 0, 0, 0)}
    check_loads(found, MODEL, "directory")


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (pb.ExpertLoadReply(window_s=60), "no expert has had a row yet"),
        (pb.ExpertLoadReply(window_s=float("nan"), layers=[pb.LayerRows(experts=[0], rows=[1])]), "no expert has had"),
        (pb.ExpertLoadReply(window_s=1, layers=[pb.LayerRows(layer=0, experts=[4], rows=[1])]), "layer 0, expert 4"),
        (pb.ExpertLoadReply(window_s=1, layers=[pb.LayerRows(layer=1, experts=[0], rows=[1])]), "layer 1, expert 0"),
    ],
)
def test_observations_that_say_nothing(reply: pb.ExpertLoadReply, said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        observed_loads(reply, MODEL)
