"""Shapes of models, what they need, and what a replica sustains."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from placement_values import loads_of, manifest

from expertmesh.artifact.manifest import read_manifest
from expertmesh.config import EmulatedDevice, GroupSection
from expertmesh.errors import ConfigError
from expertmesh.placement.capacity import assumed_capacity, modelled_capacity, observed_capacity
from expertmesh.placement.shapes import published, shape_of
from expertmesh.placement.sizing import size_of_artifact, size_of_shape, sizing_text
from expertmesh.v1 import directory_pb2

NUMBERS = "layers=4,experts=8,top_k=2,hidden=64,intermediate=128"


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral-8x7b", 46.7, 12.7),
        ("deepseek-v3", 671.0, 36.6),
        ("gpt-oss-120b", 116.8, 5.1),
        ("qwen3-30b-a3b", 30.5, 3.0),
    ],
)
def test_published_shapes_have_their_published_sizes(name: str, total: float, active: float) -> None:
    shape = published()[name]
    assert shape.source.startswith("https://")
    sizing = size_of_shape(shape.manifest(name), shape)
    assert sizing.total_parameters is not None and sizing.active_parameters is not None
    assert sizing.total_parameters / 1e9 == pytest.approx(total, rel=0.005)
    assert sizing.active_parameters / 1e9 == pytest.approx(active, rel=0.02)


def test_dense_layers_come_first() -> None:
    assert list(published()["deepseek-v3"].manifest("x").layers) == list(range(3, 61))


def test_a_shape_by_its_numbers() -> None:
    name, shape = shape_of(NUMBERS)
    sizing = size_of_shape(shape.manifest(name), shape)
    assert sizing.experts_gib == 4 * 8 * 3 * 64 * 128 * 2 / 2**30
    assert sizing.expert_gflops_per_token == 4 * 2 * 2 * 3 * 64 * 128 / 1e9
    assert sizing.trunk_gib is None and "trunk not known" in sizing_text(sizing)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpt-5", "no model 'gpt-5'; known are mixtral-8x7b, "),
        ("layers=4", "experts: is missing"),
        (f"{NUMBERS},depth=3", "depth: unknown key"),
        (NUMBERS.replace("top_k=2", "top_k=9"), "top_k: 9 of 8 experts"),
        (NUMBERS.replace("hidden=64", "hidden=-1"), "hidden: Input should be greater than 0"),
        (NUMBERS.replace("layers=4", "layers=1e9"), "layers: Input should be a valid integer"),
        ("=", "layers: is missing"),
    ],
)
def test_shapes_that_are_none(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        shape_of(text)
    assert str(error.value).startswith("--shape: ") and said in str(error.value)


def test_the_size_of_an_artifact(demo_artifact: Path) -> None:
    model = read_manifest(demo_artifact)
    sizing = size_of_artifact(model, demo_artifact)
    assert sizing.experts_gib == sum(model.layers.values()) * model.expert_bytes / 2**30
    assert sizing.trunk_gib is not None and sizing.trunk_gib > 0


def window(rows: int, window_s: float, busy_s: float) -> directory_pb2.ExpertLoadReply:
    layers = [directory_pb2.LayerRows(layer=0, experts=[0], rows=[rows])]
    return directory_pb2.ExpertLoadReply(window_s=window_s, layers=layers, busy_s=busy_s)


def test_observed_capacity() -> None:
    found = observed_capacity(window(1500, 10, 7.5))
    assert found is not None and found.rows_per_s == pytest.approx(200)
    assert found.source == "observed: 150 rows/s keep 0.75 replicas busy"


@pytest.mark.parametrize(("rows", "window_s", "busy_s"), [(1500, 10, 0.1), (1500, 10, 0), (0, 10, 7), (10, 0, 7)])
def test_too_little_to_do_for_a_capacity(rows: int, window_s: float, busy_s: float) -> None:
    assert observed_capacity(window(rows, window_s, busy_s)) is None


def test_modelled_and_assumed_capacity() -> None:
    model = manifest({0: 8, 1: 8})
    device = EmulatedDevice(teraflops=1, memory_gb_per_s=1, overhead_us=0)
    # 16 rows touch all 8 experts, whose weights of 1 MiB take the time
    assert modelled_capacity(device, model, 16).rows_per_s == pytest.approx(16 / (8 * 2**20 / 1e9), rel=1e-3)
    loads = loads_of(numpy.full((2, 8), 10.0))
    today = [GroupSection(name="a", experts="0-7", min_replicas=4, max_replicas=4)]
    assert assumed_capacity(loads, 0.5, today).rows_per_s == 160 / (4 * 0.5)
    assert assumed_capacity(loads, 0.5, ()).rows_per_s == 160 / 0.5
