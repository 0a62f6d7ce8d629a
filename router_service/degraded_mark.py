"""The mark of answers that went on without an expert, from the scheduler to the responses. Written against vLLM 0.32.

vLLM's outputs have no field for it: it travels to the engine's front end as an entry of `kv_transfer_params`, where it
is taken out again, since vLLM shows that in few of its responses. The front end marks all: a body, or each chunk of a
stream from the first that is concerned on, has `"expertmesh": {"degraded": true}`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine import FinishReason

from expertmesh.metrics import Exporter
from router_service.metrics import DEGRADED_RESPONSES

KEY = "expertmesh"
DEGRADED = {"degraded": True}
DATA, DONE = "data: ", "data: [DONE]"


@dataclass(slots=True)
class Answer:
    """One response under way."""

    degraded: bool = False


_answer: ContextVar[Answer | None] = ContextVar("expertmesh_answer", default=None)


def mark(output: Any) -> None:
    """Marks an EngineCoreOutput."""
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: DEGRADED}


def watch(processor: Any, exporter: Exporter | None = None) -> None:
    """Has an OutputProcessor tell the response that a request belongs to of marks. A marked request that belongs to
    none, so that nobody would know, ends with an error."""
    exporter = exporter or Exporter()
    add_request, process_outputs = processor.add_request, processor.process_outputs

    def add(request: Any, *args: Any, **kwargs: Any) -> None:
        add_request(request, *args, **kwargs)
        processor.request_states[request.request_id].expertmesh_answer = _answer.get()

    def process(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            if not output.kv_transfer_params or KEY not in output.kv_transfer_params:
                continue
            rest = {key: value for key, value in output.kv_transfer_params.items() if key != KEY}
            output.kv_transfer_params = rest or None
            state = processor.request_states.get(output.request_id)
            answer: Answer | None = getattr(state, "expertmesh_answer", None)
            if answer is None:
                output.finish_reason = FinishReason.ERROR
            elif not answer.degraded:
                answer.degraded = True
                if exporter.wanted:
                    exporter.add(DEGRADED_RESPONSES, 1)
        return process_outputs(outputs, *args, **kwargs)

    processor.add_request, processor.process_outputs = add, process


async def marked(responses: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The same responses of one HTTP request, bodies or chunks as text, marked where they are degraded."""
    answer = Answer()
    _answer.set(answer)
    async for response in responses:
        yield with_mark(response) if answer.degraded else response


def with_mark(response: Any) -> Any:
    """A body or an event of a stream with the mark; an error is none, and stays as it is."""
    if not isinstance(response, str):
        return response if hasattr(response, "error") else response.model_copy(update={KEY: DEGRADED})
    if not response.startswith(DATA) or response.startswith(DONE):
        return response
    chunk = json.loads(response.removeprefix(DATA))
    if "error" in chunk:
        return response
    return f"{DATA}{json.dumps({**chunk, KEY: DEGRADED}, ensure_ascii=False, separators=(',', ':'))}\n\n"
