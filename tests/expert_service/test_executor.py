from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_service.executor import Executor, LoopExecutor, Pairs, add_by_row, add_in_turns
from expert_service.grouped import GroupedExecutor, build_executor
from expert_service.weights import HeldExperts, load_held_experts
from expertmesh.artifact.function import expert_forward
from expertmesh.artifact.manifest import ExpertFunction, read_manifest
from expertmesh.errors import ConfigError

CPU = torch.device("cpu")
GPT_OSS = ExpertFunction(activation="swiglu_clamped", bias=True, alpha=1.702, limit=7.0)
FUNCTIONS = [ExpertFunction(activation="silu"), ExpertFunction(activation="gelu", gated=False, bias=True), GPT_OSS]
EXECUTORS: list[Callable[[HeldExperts, torch.device], Executor]] = [LoopExecutor, GroupedExecutor]


def hold(artifact: Path, wanted: dict[int, frozenset[int]] | None = None) -> HeldExperts:
    manifest = read_manifest(artifact)
    return load_held_experts(
        artifact, manifest, wanted or {layer: frozenset(range(count)) for layer, count in manifest.layers.items()}
    )


def pairs(rows: list[int], experts: list[int], weights: list[float]) -> Pairs:
    return Pairs(
        numpy.array(rows, dtype=numpy.int32),
        numpy.array(experts, dtype=numpy.int32),
        numpy.array(weights, dtype=numpy.float32),
    )


def dense(held: HeldExperts, layer: int, hidden_states: torch.Tensor, asked: Pairs) -> torch.Tensor:
    """The same sums, pair by pair in fp64."""
    sums = torch.zeros(hidden_states.shape, dtype=torch.float64)
    for row, expert, weight in zip(asked.rows, asked.experts, asked.weights, strict=True):
        x = hidden_states[row : row + 1].to(held.manifest.torch_dtype)
        sums[row] += float(weight) * expert_forward(x, held.layers[layer][expert], held.manifest.expert_function)[0]
    return sums


@pytest.mark.parametrize("make", EXECUTORS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.activation)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_dense_computation(
    write_artifact: Callable[..., Path], make: Callable[..., Executor], function: ExpertFunction, dtype: str
) -> None:
    held = hold(write_artifact(expert_function=function, dtype=dtype))
    executor = make(held, CPU)
    generator = numpy.random.default_rng(1)
    hidden_states = torch.randn(33, 16, generator=torch.Generator().manual_seed(1))
    asked = Pairs(
        generator.integers(0, 33, 90, dtype=numpy.int32),
        generator.integers(0, 6, 90, dtype=numpy.int32),
        generator.random(90, dtype=numpy.float32),
    )
    result = executor.run(1, hidden_states, asked)
    assert result.dtype == torch.float32
    tolerance = 1e-5 if dtype == "float32" else 8e-2
    torch.testing.assert_close(
        result.double(), dense(held, 1, hidden_states, asked), atol=tolerance, rtol=tolerance, check_dtype=False
    )


columns = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.floats(-2, 2, width=32)), max_size=24)


@pytest.mark.parametrize("make", EXECUTORS)
@given(asked=columns)
@settings(max_examples=60, deadline=None)
def test_any_pairs_duplicates_and_rows_without_one(
    artifact: Path, make: Callable[..., Executor], asked: list[tuple[int, int, float]]
) -> None:
    held = hold(artifact)
    hidden_states = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    columns = pairs(*([pair[i] for pair in asked] for i in range(3)))  # type: ignore[arg-type]
    result = make(held, CPU).run(3, hidden_states, columns)
    torch.testing.assert_close(result.double(), dense(held, 3, hidden_states, columns), atol=1e-5, rtol=1e-5)
    untouched = [row for row in range(5) if row not in columns.rows]
    assert not result[untouched].any()


@pytest.mark.parametrize("make", EXECUTORS)
def test_no_rows_and_no_pairs(artifact: Path, make: Callable[..., Executor]) -> None:
    executor = make(hold(artifact), CPU)
    assert executor.run(1, torch.empty(0, 16), pairs([], [], [])).shape == (0, 16)
    assert executor.run(1, torch.ones(2, 16), pairs([], [], [])).tolist() == [[0.0] * 16] * 2


@pytest.mark.parametrize("make", EXECUTORS)
def test_a_rows_sum_does_not_depend_on_the_order_of_pairs_or_on_the_other_rows(
    artifact: Path, make: Callable[..., Executor]
) -> None:
    executor = make(hold(artifact), CPU)
    hidden_states = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    one = executor.run(1, hidden_states, pairs([4, 4, 4], [5, 0, 2], [0.3, 0.2, 0.5]))
    other = executor.run(1, hidden_states, pairs([4, 4, 4], [2, 5, 0], [0.5, 0.3, 0.2]))
    assert torch.equal(one, other)
    crowd = pairs([0, 4, 1, 4, 2, 4, 3, 5], [5, 5, 2, 0, 0, 2, 5, 2], [0.1, 0.3, 0.4, 0.2, 0.9, 0.5, 0.7, 0.8])
    torch.testing.assert_close(executor.run(1, hidden_states, crowd)[4], one[4], atol=1e-6, rtol=1e-6)


def test_sums_taken_in_turns_are_those_taken_pair_by_pair() -> None:
    generator = numpy.random.default_rng(6)
    rows = generator.integers(0, 50, 3000, dtype=numpy.int32)
    weighted = torch.from_numpy(generator.standard_normal((3000, 16), dtype=numpy.float32))
    one_by_one, in_turns, at_once = torch.ones(50, 16), torch.ones(50, 16), torch.ones(50, 16)
    for row, values in zip(rows.tolist(), weighted, strict=True):
        one_by_one[row] += values
    add_in_turns(in_turns, weighted, rows)
    add_by_row(at_once, weighted, Pairs(rows, rows, numpy.ones(3000, dtype=numpy.float32)))
    assert torch.equal(in_turns, one_by_one) and torch.equal(at_once, one_by_one)


def test_more_pairs_than_are_computed_at_a_time(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = LoopExecutor(hold(artifact), CPU)
    hidden_states = torch.randn(9, 16, generator=torch.Generator().manual_seed(5))
    asked = pairs([r % 9 for r in range(40)], [r % 6 for r in range(40)], [r / 40 for r in range(40)])
    whole = executor.run(1, hidden_states, asked)
    monkeypatch.setattr("expert_service.executor.CHUNK_PAIRS", 7)
    torch.testing.assert_close(executor.run(1, hidden_states, asked), whole, atol=1e-6, rtol=1e-6)


def test_rows_of_another_type_are_computed_in_the_weights_type(artifact: Path) -> None:
    executor = LoopExecutor(hold(artifact), CPU)
    hidden_states = torch.randn(2, 16).bfloat16()
    asked = pairs([0, 1], [1, 2], [1.0, 1.0])
    assert torch.equal(executor.run(1, hidden_states, asked), executor.run(1, hidden_states.float(), asked))


def test_weights_are_read_where_they_are_mapped(artifact: Path) -> None:
    held = hold(artifact, {1: frozenset({2})})
    executor = LoopExecutor(held, CPU)
    assert executor._layers[1][2].gate_up.data_ptr() == held.layers[1][2].gate_up.data_ptr()
    assert held.total_bytes == 4 * (2 * 24 * 16 + 16 * 24)
    assert held.mask(1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("wanted", "wrong"),
    [
        ({2: frozenset({0})}, "layer 2 has none .MoE layers: 1,3."),
        ({3: frozenset({3, 4})}, "layer 3 has experts 0-3, not 4"),
    ],
)
def test_experts_that_do_not_exist_are_named(artifact: Path, wanted: dict[int, frozenset[int]], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        hold(artifact, wanted)


def test_a_cpu_is_served_by_the_loop(artifact: Path) -> None:
    assert isinstance(build_executor(hold(artifact), CPU), LoopExecutor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", EXECUTORS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.activation)
def test_a_gpu_computes_what_the_cpu_does(
    write_artifact: Callable[..., Path], make: Callable[..., Executor], function: ExpertFunction
) -> None:
    held = hold(write_artifact(expert_function=function, dtype="bfloat16"))
    generator = numpy.random.default_rng(4)
    hidden_states = torch.randn(200, 16, generator=torch.Generator().manual_seed(4))
    chosen = generator.choice(200 * 6, 500, replace=False)
    asked = Pairs(
        (chosen // 6).astype(numpy.int32), (chosen % 6).astype(numpy.int32), generator.random(500, dtype=numpy.float32)
    )
    executor = make(held, torch.device("cuda"))
    result = executor.run(1, hidden_states, asked)
    torch.testing.assert_close(result, LoopExecutor(held, CPU).run(1, hidden_states, asked), atol=3e-2, rtol=3e-2)
    assert torch.equal(result, executor.run(1, hidden_states, asked))
