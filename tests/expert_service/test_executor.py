from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import needs_avx512_bf16, needs_gpu, needs_native, needs_vllm_cpu

from expert_service import vllm_kernels
from expert_service.choice import build_executor
from expert_service.executor import Executor, LoopExecutor, Pairs, add_by_row, add_in_turns
from expert_service.grouped import GroupedExecutor
from expert_service.native_executor import NativeExecutor, native_serves
from expert_service.packed import PackedExecutor
from expert_service.vllm_kernels import Kernels, find_kernels
from expert_service.weights import HeldExperts, hold_experts
from expertmesh.artifact.experts import ExpertWeights
from expertmesh.artifact.function import expert_forward
from expertmesh.artifact.manifest import ExpertFunction, read_manifest
from expertmesh.errors import ConfigError

CPU = torch.device("cpu")
GPT_OSS = ExpertFunction(activation="swiglu_clamped", bias=True, alpha=1.702, limit=7.0)
FUNCTIONS = [ExpertFunction(activation="silu"), ExpertFunction(activation="gelu", gated=False, bias=True), GPT_OSS]
FUSED_FUNCTIONS = [
    *(ExpertFunction(activation=name) for name in ("silu", "gelu", "gelu_pytorch_tanh")),
    ExpertFunction(activation="silu", bias=True),
    ExpertFunction(activation="swiglu_clamped", alpha=1.702, limit=7.0),
    GPT_OSS,
]
HIDDEN, INNER = 32, 96


def packed(held: HeldExperts, device: torch.device) -> PackedExecutor:
    kernels = find_kernels(held.manifest, 6)
    assert device == CPU and kernels is not None
    return PackedExecutor(held, kernels, num_threads=2)


GENERAL: list[Any] = [LoopExecutor, GroupedExecutor]
EXECUTORS = [*GENERAL, pytest.param(packed, marks=needs_vllm_cpu)]


@pytest.fixture(scope="module")
def artifact(write_artifact: Callable[..., Path]) -> Path:
    return write_artifact(hidden_size=HIDDEN, intermediate_size=INNER)


@pytest.fixture(scope="module")
def bf16_artifact(write_artifact: Callable[..., Path]) -> Path:
    return write_artifact(hidden_size=HIDDEN, intermediate_size=INNER, dtype="bfloat16")


def hold(artifact: Path, wanted: dict[int, frozenset[int]] | None = None) -> HeldExperts:
    manifest = read_manifest(artifact)
    return hold_experts(
        artifact, manifest, wanted or {layer: frozenset(range(count)) for layer, count in manifest.layers.items()}
    )


def pairs(rows: list[int], experts: list[int], weights: list[float]) -> Pairs:
    return Pairs(
        numpy.array(rows, dtype=numpy.int32),
        numpy.array(experts, dtype=numpy.int32),
        numpy.array(weights, dtype=numpy.float32),
    )


def dense(
    held: HeldExperts, layer: int, hidden_states: torch.Tensor, asked: Pairs, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The same sums, pair by pair in fp64, of experts that compute in their own type or another."""
    sums = torch.zeros(hidden_states.shape, dtype=torch.float64)
    own = held.manifest.torch_dtype
    experts = {
        index: ExpertWeights(**{name: tensor.to(dtype or own) for name, tensor in expert.tensors().items()})
        for index, expert in held.load(layer).items()
    }
    for row, expert, weight in zip(asked.rows, asked.experts, asked.weights, strict=True):
        x = hidden_states[row : row + 1].to(own).to(dtype or own)
        sums[row] += float(weight) * expert_forward(x, experts[expert], held.manifest.expert_function)[0]
    return sums


def some_pairs(rows: int, experts: int, count: int) -> Pairs:
    generator = numpy.random.default_rng(1)
    return Pairs(
        generator.integers(0, rows, count, dtype=numpy.int32),
        generator.integers(0, experts, count, dtype=numpy.int32),
        generator.random(count, dtype=numpy.float32),
    )


@pytest.mark.parametrize("make", GENERAL)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.activation)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_dense_computation(
    write_artifact: Callable[..., Path], make: Callable[..., Executor], function: ExpertFunction, dtype: str
) -> None:
    held = hold(write_artifact(expert_function=function, dtype=dtype))
    hidden_states = torch.randn(33, 16, generator=torch.Generator().manual_seed(1))
    asked = some_pairs(33, 6, 90)
    result = make(held, CPU).run(1, hidden_states, asked)
    tolerance = 1e-5 if dtype == "float32" else 8e-2
    torch.testing.assert_close(
        result.double(), dense(held, 1, hidden_states, asked), atol=tolerance, rtol=tolerance, check_dtype=False
    )


def fastest(held: HeldExperts) -> Kernels | None:
    return find_kernels(held.manifest, 6)


def vllms_own(held: HeldExperts) -> Kernels | None:
    """In the form that every CPU has, also where another kernel is faster."""
    assert vllm_kernels._load_library()
    return vllm_kernels._fused_moe(held.manifest.expert_function, amx=False)


@needs_vllm_cpu
@pytest.mark.parametrize("find", [fastest, vllms_own])
@pytest.mark.parametrize("function", FUSED_FUNCTIONS, ids=lambda function: function.activation)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fused_kernels_equal_the_dense_computation(
    write_artifact: Callable[..., Path],
    find: Callable[[HeldExperts], Kernels | None],
    function: ExpertFunction,
    dtype: str,
) -> None:
    held = hold(write_artifact(hidden_size=HIDDEN, intermediate_size=INNER, expert_function=function, dtype=dtype))
    kernels = find(held)
    assert kernels is not None
    executor = PackedExecutor(held, kernels, num_threads=1)
    # each pair that is rounded to bf16 before the sum adds an error of its own
    most = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 5e-2 if kernels.by_pair else 3e-2}[dtype]
    for rows, count in ((1, 1), (1, 3), (33, 90), (200, 900)):
        hidden_states = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))
        asked = some_pairs(rows, 6, count)
        result = executor.run(1, hidden_states, asked)
        exact = dense(held, 1, hidden_states, asked, torch.float64)
        errors = (result.double() - exact) / exact.square().mean().sqrt()
        assert errors.abs().max() < most
        assert errors.square().mean().sqrt() < {"float32": 1e-6, "float16": 6e-4, "bfloat16": 5e-3}[dtype]


@needs_vllm_cpu
def test_a_subset_of_experts_that_differs_per_layer(artifact: Path) -> None:
    held = hold(artifact, {1: frozenset({5, 2}), 3: frozenset({0, 1, 3})})
    hidden_states = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(7))
    executor = build_executor(held, CPU)
    for layer, experts in ((1, [2, 5, 5, 2, 2]), (3, [3, 1, 0, 3, 0])):
        asked = pairs([0, 0, 1, 2, 3], experts, [0.5, 0.25, 1.0, 2.0, 0.75])
        expected = dense(held, layer, hidden_states, asked)
        torch.testing.assert_close(executor.run(layer, hidden_states, asked).double(), expected, atol=1e-5, rtol=1e-5)


columns = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.floats(-2, 2, width=32)), max_size=24)


@pytest.mark.parametrize("make", EXECUTORS)
@given(asked=columns)
@settings(max_examples=60, deadline=None)
def test_any_pairs_duplicates_and_rows_without_one(
    artifact: Path, make: Callable[..., Executor], asked: list[tuple[int, int, float]]
) -> None:
    held = hold(artifact)
    hidden_states = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))
    columns = pairs(*([pair[i] for pair in asked] for i in range(3)))  # type: ignore[arg-type]
    result = make(held, CPU).run(3, hidden_states, columns)
    # a row's terms that cancel leave the rounding errors of the terms: they are told by the row's weights
    scale = torch.ones(5, 1, dtype=torch.float64)
    scale.index_add_(0, torch.from_numpy(columns.rows).long(), torch.from_numpy(abs(columns.weights)).double()[:, None])
    difference = (result.double() - dense(held, 3, hidden_states, columns)).abs()
    assert (difference <= 1e-5 * scale).all()
    untouched = [row for row in range(5) if row not in columns.rows]
    assert not result[untouched].any()


@pytest.mark.parametrize("make", EXECUTORS)
def test_no_rows_and_no_pairs(artifact: Path, bf16_artifact: Path, make: Callable[..., Executor]) -> None:
    for path in (artifact, bf16_artifact):
        executor = make(hold(path), CPU)
        assert executor.run(1, torch.empty(0, HIDDEN), pairs([], [], [])).shape == (0, HIDDEN)
        assert executor.run(1, torch.ones(2, HIDDEN), pairs([], [], [])).tolist() == [[0.0] * HIDDEN] * 2


@pytest.mark.parametrize("make", EXECUTORS)
def test_a_rows_sum_does_not_depend_on_the_order_of_pairs_or_on_the_other_rows(
    artifact: Path, make: Callable[..., Executor]
) -> None:
    executor = make(hold(artifact), CPU)
    hidden_states = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(3))
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


@pytest.mark.parametrize("make", [LoopExecutor, pytest.param(packed, marks=needs_vllm_cpu)])
def test_more_pairs_than_are_computed_at_a_time(
    artifact: Path, make: Callable[..., Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_states = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(5))
    asked = pairs([r % 9 for r in range(41)], [r % 6 for r in range(41)], [r / 40 for r in range(41)])
    whole = make(hold(artifact), CPU).run(1, hidden_states, asked)
    monkeypatch.setattr("expert_service.executor.CHUNK_PAIRS", 7)
    monkeypatch.setattr("expert_service.packed.CHUNK_PAIRS", 7)
    result = make(hold(artifact), CPU).run(1, hidden_states, asked)
    torch.testing.assert_close(result, whole, atol=1e-6, rtol=1e-6)


@needs_vllm_cpu
@pytest.mark.parametrize("make", [packed, build_executor])
@pytest.mark.parametrize(("hidden", "inner"), [(HIDDEN, INNER), (512, 1024)])
@pytest.mark.parametrize("function", [ExpertFunction(activation="silu"), GPT_OSS], ids=lambda each: each.activation)
def test_fused_sums_are_the_same_bits_whatever_else_is_in_the_batch(
    write_artifact: Callable[..., Path],
    make: Callable[..., Executor],
    hidden: int,
    inner: int,
    function: ExpertFunction,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_artifact(hidden_size=hidden, intermediate_size=inner, dtype="bfloat16", expert_function=function)
    executor = make(hold(path), CPU)
    monkeypatch.setattr("expert_service.packed.CHUNK_PAIRS", 500)
    in_parts = make(hold(path), CPU)
    hidden_states = torch.randn(150, hidden, generator=torch.Generator().manual_seed(8)).bfloat16()
    asked = some_pairs(150, 6, 700)
    crowd = executor.run(1, hidden_states, asked)
    assert torch.equal(in_parts.run(1, hidden_states, asked), crowd)
    for row in range(0, 150, 10):
        own = asked.rows == row
        alone = Pairs(asked.rows[own] * 0, asked.experts[own][::-1], asked.weights[own][::-1])
        if len(numpy.unique(alone.experts)) == len(alone.experts):
            assert torch.equal(executor.run(1, hidden_states[row : row + 1], alone)[0], crowd[row])


def native(held: HeldExperts) -> NativeExecutor:
    assert native_serves(held.manifest, num_threads=1)
    return NativeExecutor(held)


@needs_native
@needs_avx512_bf16
@pytest.mark.parametrize(("hidden", "inner"), [(32, 32), (HIDDEN, INNER), (288, 160)])
def test_the_native_core_equals_the_dense_computation(
    write_artifact: Callable[..., Path], hidden: int, inner: int
) -> None:
    held = hold(write_artifact(hidden_size=hidden, intermediate_size=inner, dtype="bfloat16"))
    executor = native(held)
    for rows, count in ((1, 1), (1, 3), (9, 9), (33, 90), (200, 900), (2000, 9000)):
        hidden_states = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rows)).bfloat16()
        asked = some_pairs(rows, 6, count)
        result = executor.run(1, hidden_states, asked)
        exact = dense(held, 1, hidden_states, asked, torch.float64)
        errors = (result.double() - exact) / exact.square().mean().sqrt()
        assert errors.abs().max() < 5e-2
        assert errors.square().mean().sqrt() < 5e-3
        # more pairs than are computed at a time, and fewer
        half = asked.rows < rows // 2
        fewer = Pairs(asked.rows[half], asked.experts[half], asked.weights[half])
        assert torch.equal(executor.run(1, hidden_states[: rows // 2], fewer), result[: rows // 2])


@needs_native
@needs_avx512_bf16
@given(asked=columns, crowd=columns, parts=st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_the_native_cores_sums_are_the_same_bits_whatever_else_is_in_the_batch(
    bf16_artifact: Path, asked: list[tuple[int, int, float]], crowd: list[tuple[int, int, float]], parts: int
) -> None:
    """Any pairs, duplicates and rows without one; in any order but that of one row's pairs with one expert."""
    executor = native(hold(bf16_artifact))
    hidden_states = torch.randn(10, HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16()

    def run(chosen: list[tuple[int, int, float]]) -> torch.Tensor:
        return executor.run(3, hidden_states, pairs(*([one[i] for one in chosen] for i in range(3))))  # type: ignore[arg-type]

    alone = run(asked)
    others = [(row + 5, expert, weight) for row, expert, weight in crowd] * parts
    both = sorted([*asked, *others], key=lambda one: one[1], reverse=True)
    assert torch.equal(run(both)[:5], alone[:5])
    assert not alone[[row for row in range(10) if row not in {one[0] for one in asked}]].any()
    expected = dense(
        hold(bf16_artifact), 3, hidden_states, pairs(*([one[i] for one in asked] for i in range(3))), torch.float64
    )  # type: ignore[arg-type]
    scale = torch.ones(10, 1, dtype=torch.float64)
    for row, _, weight in asked:
        scale[row] += abs(weight)
    assert ((alone.double() - expected).abs() <= 2e-2 * scale * (1 + expected.abs())).all()


@needs_native
@needs_avx512_bf16
def test_the_native_core_refuses_what_is_not_there(bf16_artifact: Path) -> None:
    executor = native(hold(bf16_artifact, {1: frozenset({0, 2}), 3: frozenset({0})}))
    hidden_states = torch.ones(2, HIDDEN).bfloat16()
    for row, expert in ((2, 0), (-1, 0), (0, 1), (0, 6), (0, -1)):
        with pytest.raises(IndexError, match="a row that is not there, or an expert that is not held"):
            executor.run(1, hidden_states, pairs([row], [expert], [1.0]))
    assert executor.run(1, hidden_states, pairs([], [], [])).tolist() == [[0.0] * HIDDEN] * 2
    assert executor.run(1, hidden_states[:0], pairs([], [], [])).shape == (0, HIDDEN)


@needs_native
@needs_avx512_bf16
def test_numbers_that_are_none_stay_so_in_their_row_alone(bf16_artifact: Path) -> None:
    executor = native(hold(bf16_artifact))
    hidden_states = torch.ones(3, HIDDEN).bfloat16()
    hidden_states[1, 5] = torch.nan
    sums = executor.run(1, hidden_states, pairs([0, 1, 2, 2], [0, 0, 0, 1], [1.0, 1.0, 1.0, 1.0]))
    assert sums[1].isnan().all() and sums[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("fields", "num_threads"),
    [
        ({"dtype": "float32"}, 1),
        ({"dtype": "bfloat16"}, 2),
        ({"dtype": "bfloat16", "expert_function": GPT_OSS}, 1),
        ({"dtype": "bfloat16", "expert_function": ExpertFunction(activation="gelu")}, 1),
        ({"dtype": "bfloat16", "expert_function": ExpertFunction(activation="silu", bias=True)}, 1),
        ({"dtype": "bfloat16", "intermediate_size": 48}, 1),
    ],
    ids=str,
)
def test_what_the_native_core_leaves_to_others(
    write_artifact: Callable[..., Path], fields: dict[str, Any], num_threads: int
) -> None:
    held = hold(write_artifact(**{"hidden_size": HIDDEN, "intermediate_size": INNER} | fields))
    assert not native_serves(held.manifest, num_threads)
    assert not isinstance(build_executor(held, CPU, num_threads), NativeExecutor)


@needs_native
@needs_vllm_cpu
@given(asked=columns)
@settings(max_examples=40, deadline=None)
def test_pairs_spread_by_native_code_and_by_numpy_are_the_same_bits(
    bf16_artifact: Path, asked: list[tuple[int, int, float]]
) -> None:
    """Whatever kernel the machine has: the pairs' own are asked for directly."""
    executor = packed(hold(bf16_artifact), CPU)
    hidden_states = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16()
    columns = pairs(*([pair[i] for pair in asked] for i in range(3)))  # type: ignore[arg-type]
    weights, slots = executor._layers[3].weights, executor._layers[3].slots
    native = executor._run_pairs(weights, slots, hidden_states, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expert_service.topk.spread_pairs", None)
        plain = executor._run_pairs(weights, slots, hidden_states, columns)
    assert torch.equal(native, plain)


@pytest.mark.parametrize("make", EXECUTORS)
def test_rows_of_another_type_are_computed_in_the_weights_type(artifact: Path, make: Callable[..., Executor]) -> None:
    executor = make(hold(artifact), CPU)
    hidden_states = torch.randn(2, HIDDEN).bfloat16()
    asked = pairs([0, 1], [1, 2], [1.0, 1.0])
    assert torch.equal(executor.run(1, hidden_states, asked), executor.run(1, hidden_states.float(), asked))


def test_what_is_held(artifact: Path) -> None:
    held = hold(artifact, {1: frozenset({2}), 3: frozenset({0, 3})})
    assert held.total_bytes == 3 * 4 * (2 * INNER * HIDDEN + HIDDEN * INNER)
    assert sorted(held.load(3)) == [0, 3]
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


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 16},
        {"intermediate_size": 48},
        {"expert_function": ExpertFunction(activation="silu", gated=False)},
        {"expert_function": ExpertFunction(activation="relu")},
        {"expert_function": ExpertFunction(activation="swiglu_clamped", alpha=1.702, limit=5.0)},
    ],
    ids=str,
)
def test_what_no_fused_kernel_computes_is_served_by_the_loop(
    write_artifact: Callable[..., Path], fields: dict[str, Any]
) -> None:
    path = write_artifact(**{"hidden_size": HIDDEN, "intermediate_size": INNER} | fields)
    assert isinstance(build_executor(hold(path), CPU), LoopExecutor)


def test_more_weights_than_the_kernel_can_count_are_left_to_the_loop(artifact: Path) -> None:
    assert find_kernels(read_manifest(artifact), 2**31 // (2 * HIDDEN * INNER) + 1) is None


@needs_gpu
@pytest.mark.parametrize("make", GENERAL)
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
    expected = LoopExecutor(held, CPU).run(1, hidden_states, asked)
    torch.testing.assert_close(result.float(), expected, atol=3e-2, rtol=3e-2)
    assert torch.equal(result, executor.run(1, hidden_states, asked))


@needs_gpu
@pytest.mark.parametrize("make", GENERAL)
def test_a_gpus_answers_are_complete_and_its_callers_buffers_free_at_once(
    write_artifact: Callable[..., Path], make: Callable[..., Executor]
) -> None:
    """Rows are overwritten as soon as `run` returns, as an endpoint's buffers are, and earlier answers still stand."""
    held = hold(write_artifact(hidden_size=256, intermediate_size=512, dtype="bfloat16"))
    executor = make(held, torch.device("cuda"))
    rows = torch.randn(20, 64, 256, generator=torch.Generator().manual_seed(9)).bfloat16()
    asked = some_pairs(64, 6, 128)
    buffer = torch.empty_like(rows[0])
    answers = []
    for batch in rows:
        buffer.copy_(batch)
        answers.append(executor.run(1, buffer, asked))
        buffer.zero_()
    for batch, answer in zip(rows, answers, strict=True):
        assert answer.device.type == "cpu" and torch.equal(answer, executor.run(1, batch, asked))
