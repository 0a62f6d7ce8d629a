"""Degraded mode: a replica is away, answers go on without its expert and say so; those that need it not are whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_vllm_losses import outcomes

PROGRAM = Path(__file__).with_name("vllm_degraded.py")
pytestmark = pytest.mark.vllm
schedulers = pytest.mark.parametrize("scheduler", [0, 1], ids=["sync", "async"])


@pytest.fixture(scope="module")
def runs(demo_artifact: Path) -> list[dict[str, Any]]:
    return outcomes(PROGRAM, demo_artifact)


@schedulers
def test_answers_are_those_of_the_model_with_the_expert_masked_and_marked(
    runs: list[dict[str, Any]], scheduler: int
) -> None:
    run, masked = runs[scheduler], runs[-1]["masked"]
    assert not any(one["degraded"] for one in run["reference"])
    assert {one["degraded"] for one in masked} == {True, False}  # some need the expert, some do not
    assert run["without"] == masked
    for before, without in zip(run["reference"], run["without"], strict=True):
        assert without["degraded"] or without == before


@schedulers
def test_once_it_is_back_all_is_as_before(runs: list[dict[str, Any]], scheduler: int) -> None:
    assert runs[scheduler]["after"] == runs[scheduler]["reference"]


def test_a_router_starts_without_the_expert(runs: list[dict[str, Any]]) -> None:
    assert runs[1]["begun_without"] == runs[-1]["masked"]


@schedulers
def test_every_kind_of_response_is_marked(runs: list[dict[str, Any]], scheduler: int) -> None:
    run = runs[scheduler]
    assert run["stream"] and run["stream"] == sorted(run["stream"]) and run["stream"][-1]  # from some chunk to the last
    assert not any(run["whole_stream"])
    assert run["several"] == [True, True]
    assert run["stop_string"] == {"reason": "stop", "degraded": True}
    assert run["chat"] == sorted(run["chat"]) and run["chat"][-1]


def test_a_marked_output_that_belongs_to_no_response_is_an_error() -> None:
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    from router_service.degraded_mark import mark, watch

    kept: list[Any] = []
    processor = SimpleNamespace(
        request_states={"r": SimpleNamespace()}, add_request=lambda request: None, process_outputs=kept.extend
    )
    watch(processor)
    output = EngineCoreOutput(request_id="r", new_token_ids=[1])
    mark(output)
    processor.process_outputs([output])
    assert kept[0].finish_reason == FinishReason.ERROR and kept[0].kv_transfer_params is None
