"""Run as a program: `vllm_degraded.py ARTIFACT`. vLLM's OpenAI serving over replicas of which one is stopped and comes
back, in degraded mode.

Prints one JSON line per kind of scheduler: {"begun_without": ..., "reference": ..., "without": ..., "after": ...}, each
a list per prompt of {"tokens": [...], "degraded": whether it is marked}, and what else was asked without the replica. A
last line is {"masked": ...}: the same from transformers, the expert's weight given to the others; marked where it was
chosen. The second engine starts while the replica is stopped, and compiles: that is what warms up with rows.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import torch
from divided import CHECKPOINT, EXPERT, LAYER, MAX_TOKENS, divided, engine_settings, prompts

from expertmesh.artifact.manifest import TRUNK_DIRECTORY
from router_service.connection import RouterSettings
from router_service.degraded_mark import marked, watch

SAMPLING = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


async def start(artifact: Path, directory: str, scheduler: str, **more: Any) -> tuple[Any, Any]:
    """The engine and vLLM's serving objects."""
    from starlette.datastructures import State
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.api_server import init_app_state
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = RouterSettings(directory=directory, wait_for_experts_s=30, degrade_after_s=3)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", str(artifact / TRUNK_DIRECTORY)])
    engine = engine_settings(settings, scheduler) | more
    for name, value in engine.items():
        setattr(args, name, value)
    args.served_model_name = ["demo"]
    client = AsyncLLM.from_engine_args(AsyncEngineArgs(model=args.model, served_model_name="demo", **engine))
    watch(client.output_processor)
    state = State()
    await init_app_state(client, state, args, supported_tasks=await client.get_supported_tasks())
    return client, state


async def ask(state: Any, prompt: Any, **more: Any) -> list[Any]:
    """What the ingress would send: a body, or chunks without their `data:`."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    async def responses() -> Any:
        given = {"model": "demo", **SAMPLING, **more}
        if isinstance(prompt, dict):
            made = await state.openai_serving_chat.create_chat_completion(
                ChatCompletionRequest(messages=[prompt], **given)
            )
        else:
            made = await state.openai_serving_completion.create_completion(CompletionRequest(prompt=prompt, **given))
        if hasattr(made, "__aiter__"):
            async for chunk in made:
                yield chunk
        else:
            yield made

    found = [one async for one in marked(responses())]
    if not isinstance(found[0], str):
        return [found[0].model_dump()]
    return [json.loads(one.removeprefix("data: ")) for one in found if "[DONE]" not in one]


def is_marked(body: dict[str, Any]) -> bool:
    return body.get("expertmesh") == {"degraded": True}


async def generate(state: Any) -> list[dict[str, Any]]:
    bodies = await asyncio.gather(*(asyncio.create_task(ask(state, prompt)) for prompt in prompts()))
    return [{"tokens": body["choices"][0]["token_ids"], "degraded": is_marked(body)} for (body,) in bodies]


async def run(artifact: Path, scheduler: str, begins_without: bool) -> dict[str, Any]:
    with divided(artifact) as replicas:
        if begins_without:
            replicas.lose()
        client, state = await start(artifact, replicas.directory, scheduler, enforce_eager=not begins_without)
        found: dict[str, Any] = {}
        if begins_without:
            found["begun_without"] = await generate(state)
            replicas.replace()
            await client.reset_prefix_cache()
        found["reference"] = await generate(state)
        await asyncio.to_thread(replicas.lose)
        await client.reset_prefix_cache()  # what was cached with the expert would be whole
        found["without"] = await generate(state)
        concerned = [one["degraded"] for one in found["without"]]
        whole, marked_one = prompts()[concerned.index(False)], prompts()[concerned.index(True)]
        found["stream"] = [is_marked(one) for one in await ask(state, marked_one, stream=True)]
        found["whole_stream"] = [is_marked(one) for one in await ask(state, whole, stream=True)]
        found["several"] = [
            is_marked((await ask(state, both))[0]) for both in ([whole, marked_one], [marked_one, whole])
        ]
        end = (await ask(state, marked_one))[0]["choices"][0]["text"][-6:]
        (stopped,) = await ask(state, marked_one, stop=[end])
        found["stop_string"] = {"reason": stopped["choices"][0]["finish_reason"], "degraded": is_marked(stopped)}
        chat = await ask(state, {"role": "user", "content": "What is 2 + 3?"}, stream=True)
        found["chat"] = [is_marked(one) for one in chat]
        replicas.replace()
        found["after"] = await generate(state)
        client.shutdown()
    return found


@torch.no_grad()
def masked() -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from expertmesh.artifact.modules import find_expert_layers

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    module = sorted(find_expert_layers(model), key=lambda layer: layer.index)[LAYER].module
    chosen = False

    def leave_out(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal chosen
        rows, ids, weights = inputs
        chosen |= bool((ids == EXPERT).any())
        left = weights * (ids != EXPERT)
        return rows, ids, left * weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True)

    module.register_forward_pre_hook(leave_out)
    found = []
    for prompt in prompts():
        chosen = False
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        done = model.generate(tokens, max_new_tokens=MAX_TOKENS, do_sample=False)
        found.append({"tokens": done[0, tokens.shape[1] :].tolist(), "degraded": chosen})
    return found


if __name__ == "__main__":
    for begins_without, name in enumerate(("SparingScheduler", "SparingAsyncScheduler")):
        print(json.dumps(asyncio.run(run(Path(sys.argv[1]), name, bool(begins_without)))), flush=True)
    print(json.dumps({"masked": masked()}), flush=True)
