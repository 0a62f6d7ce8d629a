"""Requests that are gone before the output of their step comes; vLLM's scheduler alone, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.artifact.manifest import TRUNK_DIRECTORY
from router_service.losses import Lacking

pytestmark = pytest.mark.vllm
BLOCK, BLOCKS = 32, 64
PROMPT = list(range(100, 100 + 2 * BLOCK + 6))


@pytest.fixture
def scheduler(demo_artifact: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from router_service.vllm_scheduler import SparingAsyncScheduler

    init_none_hash(sha256)
    trunk = str(demo_artifact / TRUNK_DIRECTORY)
    config = EngineArgs(
        model=trunk, dtype="float32", max_model_len=256, block_size=BLOCK, enforce_eager=True, async_scheduling=True
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    cache = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
    return SparingAsyncScheduler(config, cache, StructuredOutputManager(config), BLOCK)


def request(name: str, prompt: list[int]) -> Any:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    return Request(name, prompt, sampling, None, block_hasher=get_request_block_hasher(BLOCK, sha256))


def update(scheduler: Any, step: Any) -> set[str]:
    """Whose outputs are marked or errors."""
    from vllm.v1.engine import FinishReason
    from vllm.v1.outputs import ModelRunnerOutput

    names = list(step.num_scheduled_tokens)
    outputs = ModelRunnerOutput(names, {name: number for number, name in enumerate(names)}, [[5] for _ in names])
    results = scheduler.update_from_output(step, outputs)
    found = [one for result in results.values() for one in result.outputs]
    return {one.request_id for one in found if one.kv_transfer_params or one.finish_reason == FinishReason.ERROR}


@pytest.mark.parametrize("lacking", [Lacking(degraded={BLOCK}), Lacking(lost={BLOCK})], ids=["degraded", "lost"])
@pytest.mark.parametrize("gone", ["aborted", "preempted"])
def test_those_that_read_what_it_wrote_are_told_from_the_others(scheduler: Any, gone: str, lacking: Lacking) -> None:
    from vllm.v1.request import RequestStatus

    from router_service.vllm_scheduler import LACKING_ROWS

    scheduler.add_request(first := request("first", PROMPT))
    step = scheduler.schedule()
    scheduler.add_request(request("reader", [*PROMPT[: 2 * BLOCK], *range(200, 210)]))
    scheduler.add_request(request("other", list(range(300, 300 + 3 * BLOCK))))
    following = scheduler.schedule()
    assert following.num_scheduled_tokens["reader"] == 10, "it reads what is written in the step before"
    if gone == "aborted":
        scheduler.finish_requests("first", RequestStatus.FINISHED_ABORTED)
    else:
        scheduler.running.remove(first)
        scheduler._preempt_request(first, 0.0)
    setattr(step, LACKING_ROWS, lacking)
    told = update(scheduler, step) | update(scheduler, following)
    assert told - {"first"} == {"reader"}
    assert scheduler.kv_cache_manager.get_computed_blocks(request("next", PROMPT))[1] == 0, "nobody else reads it"
